"""SI1 and SI3 on whole blocks: one pass, each layer reduced at once (methods.md section 6)."""

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.inertia import MAX_DELTA, PREFIXES, PrefixCurve, prefix_overlaps, si1
from actsparse.core.variance_shares import VarianceShares, VarianceSums, factor_levels, variance_shares, variance_sums
from actsparse.pipelines.probes.reading import DENSITIES
from actsparse.pipelines.probes.setting import Found, Setting

DELTAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# kappa of every prefix and distance, [layers, sequences, prefixes, deltas], by density and chance level.
PrefixKappas = dict[tuple[float, str | None], Float[Tensor, "layers sequences prefixes deltas"]]


def add_si1_and_si3(setting: Setting, found: Found) -> None:
    """Rows of `si1` and `si3`."""
    kappas, shares = _read(setting)
    for (density, pop), values in kappas.items():
        curve = si1(values)
        for prefix, point in zip(curve.prefixes, curve.curve, strict=True):
            found.add_layers("si1", point, r=density, pop=pop, p=prefix)
        _add_p90(found, curve, values.shape[1], density, pop)
        by_delta = values.double().nanmean(dim=(0, 1))
        for row, prefix in enumerate(PREFIXES):
            for delta in DELTAS:
                value = float(by_delta[row, delta - 1])
                found.add("si1", value, values.shape[1], layer=None, r=density, pop=pop, p=prefix, delta=delta)
    for layer, one in zip(found.layers, shares, strict=True):
        _add_shares(found, one, layer)


def _add_p90(found: Found, curve: PrefixCurve, n: int, density: float, pop: str | None) -> None:
    for layer, prefix in zip((*found.layers, None), (*curve.p90, curve.p90_mean), strict=True):
        found.add("si1_p90", None if prefix is None else float(prefix), n, layer=layer, r=density, pop=pop)


def _add_shares(found: Found, shares: VarianceShares, layer: int) -> None:
    parts = {
        "neuron": shares.neuron,
        "sequence": shares.sequence,
        "token_type": shares.token_type,
        "position": shares.position,
        "residual": shares.residual,
    }
    for factor, part in parts.items():
        found.add("si3", part.share, shares.tokens, layer=layer, factor=factor)
        if part.chance is not None:
            found.add("si3_chance", part.chance, shares.tokens, layer=layer, factor=factor)


def _read(setting: Setting) -> tuple[PrefixKappas, list[VarianceShares]]:
    reader, sink = setting.reader, setting.texts.sink_tokens
    ids = setting.texts.spread()
    levels = factor_levels(ids[:, sink:])
    length = ids.shape[1] - sink
    chance = {density: setting.rates(density) for density in DENSITIES}
    shape = (len(reader.layers), len(ids), len(PREFIXES), MAX_DELTA)
    kappas = {(density, pop): torch.zeros(shape) for density in DENSITIES for pop in chance[density]}
    shares: list[VarianceShares] = []

    def on_layer(place: int, a: Tensor) -> None:
        sums: list[VarianceSums] = []
        for row, sequence in enumerate(a[:, sink:]):
            for density, rates in chance.items():
                overlaps = prefix_overlaps(sequence, reader.masks(place, sequence, density), density)
                for pop, rate in rates.items():
                    kappas[density, pop][place, row] = overlaps.kappa(float(rate[place])).cpu()
            sums.append(variance_sums(sequence, levels.rows(row * length, (row + 1) * length)))
        total = sums[0]
        for more in sums[1:]:
            total = total.merge(more)
        shares.append(variance_shares(total))

    with setting.progress.task("probe inertia: prefixes and variance", ids.numel(), "tokens") as advance:
        reader.read(ids, on_layer)
        advance(ids.numel())
    return kappas, shares
