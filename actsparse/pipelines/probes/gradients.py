"""The probe `gradients`: HU4, the recursion of MOYU, and M2, its root cause (methods.md section 5)."""

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.hu4 import ThetaUncertainty, hu4, theta_uncertainty, token_diversity
from actsparse.core.mask_rules import MaskKind, MaskRule
from actsparse.core.root_cause import root_cause, signed_gradient_sum
from actsparse.pipelines.halving import fitting
from actsparse.pipelines.probes.setting import Found, Setting

DENSITY = 0.2
RULE = MaskRule(MaskKind.TOPK, DENSITY)

# Sums and numbers [layers, blocks] of sign(a) * dL/da.
SignedSums = tuple[Tensor, Tensor]


def gradients(setting: Setting) -> Found:
    """What the loss says about neurons, from a backward pass over each of the first N blocks.

    Positions are those after the sink tokens, less the last of each block, which has no loss of its own. In layers of
    experts HU4 is undefined: it ranks all neurons of a layer at every token, and most have no salience there.
    """
    found = Found(setting.layers)
    theta, diversity, top, exact = _collect(setting)
    if any(setting.reader.dense):
        _add_hu4(found, hu4(theta, diversity))
    found.add_layers("m2", root_cause(*top), r=DENSITY)
    if "relu" in setting.reader.loaded.record.activation.lower():
        found.add_layers("m2", root_cause(*exact), exact="true")
    return found


def _add_hu4(found: Found, result: ThetaUncertainty) -> None:
    found.add_layers("hu4", result.uncertainty)
    for one in result.bins:
        found.add_layers("hu4", one.uncertainty, bin=f"{one.low:g}")
        found.add("hu4_tokens", float(one.tokens), one.tokens, layer=None, bin=f"{one.low:g}")


def _collect(setting: Setting) -> tuple[Float[Tensor, "layers blocks positions"], Tensor, SignedSums, SignedSums]:
    reader, sink = setting.reader, setting.texts.sink_tokens
    blocks = setting.texts.pool[: setting.texts.count]
    shape = (len(reader.layers), len(blocks))
    counted = slice(sink, blocks.shape[1] - 1)
    theta = torch.full((*shape, blocks.shape[1] - 1 - sink), torch.nan, dtype=torch.float64)
    top, exact = ((torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)) for _ in range(2))
    with setting.progress.task("gradients of the loss (HU4, M2)", blocks.numel(), "tokens") as advance:
        for row, ids in enumerate(blocks):

            def on_layer(place: int, a: Tensor, gradient: Tensor, row: int = row) -> None:
                a, gradient = a[0, counted], gradient[0, counted]
                if reader.dense[place]:
                    neurons = sum(reader.widths[place])
                    theta[place, row] = theta_uncertainty((a * gradient)[:, :neurons].abs())
                for (sums, counts), masks in ((top, reader.masks(place, a, RULE)), (exact, a != 0)):
                    total, number = signed_gradient_sum(a, gradient, masks)
                    sums[place, row], counts[place, row] = total, number

            with fitting():
                reader.read_gradients(ids[None], on_layer)
            advance(len(ids))
    diversity = torch.stack([token_diversity(ids)[counted] for ids in blocks])
    return theta, diversity, top, exact
