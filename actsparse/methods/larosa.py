"""LaRoSA: top channels in a rotated basis, in which few of them hold most of the input (arXiv 2507.01299)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, drops_by_layer
from actsparse.methods.channel_replay import ChannelReplay
from actsparse.methods.channels import ALL_PROJECTIONS, rule_of, topk_fit
from actsparse.methods.gates import ChannelGate, ChannelRule, LayerGates
from actsparse.results import SiteKind, Unit

ATTENTION_IN = (Unit.Q, Unit.K, Unit.V, Unit.QKV)
MLP_IN = (Unit.GATE, Unit.UP, Unit.GATE_UP)


@dataclass(frozen=True, kw_only=True)
class LaRoSA(Method):
    """The top k of |Q^T x|_j, token by token; Q are the eigenvectors of E[x x^T] at the attention's and at the MLP's
    input. The inputs of `o` and `down` are ranked as they are (ours: the paper folds their rotations elsewhere).

    The two rotations of a layer are read for every token and are charged.
    """

    name = "larosa"
    summary = "top input channels of every projection in the basis of its principal components"
    paper = "arXiv 2507.01299"
    decides = Decides.TOKEN
    needs = (SiteKind.ATTN_IN, SiteKind.ATTN_OUT, SiteKind.MLP_IN, SiteKind.NEURON)
    saves = ALL_PROJECTIONS

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        replay = calibration.channels()
        drops = drops_by_layer(budget, self.name, replay.layers)
        shares = {(layer, unit): drops[layer] for layer in range(replay.layers) for unit in replay.widths}
        tensors = _bases(replay, "attention", ATTENTION_IN, drops) | _bases(replay, "mlp", MLP_IN, drops)
        return topk_fit(replay, shares, tensors)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        attention, mlp = (fit.tensors.get(f"layers.{layer}.{part}.basis") for part in ("attention", "mlp"))
        rules = {}
        for one in (one for one in fit.layers if one.layer == layer):
            basis = attention if one.unit in ATTENTION_IN else mlp if one.unit in MLP_IN else None
            rules[one.unit] = ChannelRule(rule_of(one, None), basis=basis)
        return LayerGates(
            channels=ChannelGate(rules), mlp_extra_bytes=_bytes(mlp), attention_extra_bytes=_bytes(attention)
        )


def principal_axes(covariance: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Eigenvectors as columns, the largest eigenvalue first; the sign makes each one's largest entry positive."""
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return axes * largest.sign()


def _bases(replay: ChannelReplay, part: str, readers: tuple[Unit, ...], drops: tuple[float, ...]) -> dict[str, Tensor]:
    """The rotation of the input that these projections read, by name, for the layers that drop anything."""
    reader = next(unit for unit in replay.widths if unit in readers)
    covariances = replay.covariance(reader) if max(drops) > 0 else [torch.empty(0)] * replay.layers
    return {
        f"layers.{layer}.{part}.basis": principal_axes(one).to(replay.dtype).contiguous()
        for layer, (one, drop) in enumerate(zip(covariances, drops, strict=True))
        if drop > 0
    }


def _bytes(basis: Tensor | None) -> int:
    return 0 if basis is None else basis.numel() * basis.element_size()
