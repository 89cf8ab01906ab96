"""SI1 and SI3 on whole blocks: one pass, each layer reduced at once (methods.md section 6)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.bootstrap import layered_ratio
from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Rate, Widths, paired_overlaps
from actsparse.core.prefixes import MAX_DELTA, PREFIXES, PrefixCurve, prefix_overlaps, si1
from actsparse.core.variance_shares import (
    VarianceShares,
    factor_levels,
    pooled_shares,
    variance_shares,
    variance_sums,
)
from actsparse.pipelines.probes.setting import UNIFORM, Found, Setting

RAW = "raw"
DELTAS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# kappa of every prefix and distance, [layers, sequences, prefixes, deltas], by rule and chance level.
PrefixKappas = dict[tuple[MaskRule, str | None], Float[Tensor, "layers sequences prefixes deltas"]]


def add_si1_and_si3(setting: Setting, found: Found) -> None:
    """Rows of `si1`, `si3`, and of overlaps by distance."""
    kappas, shares, distances = _read(setting)
    distances.add_rows(found)
    for (rule, pop), values in kappas.items():
        curve = si1(values)
        for prefix, point in zip(curve.prefixes, curve.curve, strict=True):
            found.add_layers("si1", point, **rule.where, pop=pop, p=prefix)
        _add_p90(found, curve, values.shape[1], rule, pop)
        for row, prefix in enumerate(PREFIXES):
            for delta in DELTAS:
                at = values[:, :, row, delta - 1].double()
                point = layered_ratio(at.nan_to_num(0.0), at.isnan().logical_not().double())
                found.add_interval("si1", point.mean, layer=None, **rule.where, pop=pop, p=prefix, delta=delta)
    _add_shares(found, shares)


def _add_p90(found: Found, curve: PrefixCurve, n: int, rule: MaskRule, pop: str | None) -> None:
    for layer, prefix in zip((*found.layers, None), (*curve.p90, curve.p90_mean), strict=True):
        found.add("si1_p90", None if prefix is None else float(prefix), n, layer=layer, **rule.where, pop=pop)


def _add_shares(found: Found, shares: list[VarianceShares]) -> None:
    total = torch.stack([one.squares for one in shares])
    # where nothing varies there are no shares
    total[torch.tensor([one.neuron.share is None for one in shares])] = torch.nan
    for factor, parts in {
        "neuron": [one.neuron for one in shares],
        "sequence": [one.sequence for one in shares],
        "token_type": [one.token_type for one in shares],
        "position": [one.position for one in shares],
        "residual": [one.residual for one in shares],
    }.items():
        found.add_layers("si3", layered_ratio(torch.stack([part.squares for part in parts]), total), factor=factor)
        for layer, part, one in zip(found.layers, parts, shares, strict=True):
            if part.chance is not None:
                found.add("si3_chance", part.chance, one.tokens, layer=layer, factor=factor)


class _Distances:
    """Overlaps of two tokens of a sequence that stand `d` positions apart and have different ids, by d."""

    def __init__(self, layers: int, sequences: int, chance: dict[MaskRule, dict[str | None, list[Rate]]]) -> None:
        names = [(rule, pop) for rule, rates in chance.items() for pop in (RAW, *rates)]
        shape = (len(DELTAS), layers, sequences)
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
        self.counts = {name: torch.zeros(shape, dtype=torch.float64) for name in names}

    def add(
        self,
        place: int,
        rule: MaskRule,
        masks: Bool[Tensor, "sequences positions units"],
        ids: Int[Tensor, "sequences positions"],
        rates: dict[str | None, list[Rate]],
        widths: Widths,
    ) -> None:
        """Add the sequences of one layer."""
        for step, distance in enumerate(DELTAS):
            if distance >= ids.shape[1]:
                continue
            different = (ids[:, distance:] != ids[:, :-distance]).to(masks.device)
            pairs = paired_overlaps(masks[:, distance:], masks[:, :-distance], widths).only(different)
            levels: dict[str | None, Rate] = {RAW: 0.0, **{pop: of[place] for pop, of in rates.items()}}
            for pop, rate in levels.items():
                kappas = pairs.kappa(rate)
                self.sums[rule, pop][step, place] = kappas.nansum(dim=1, dtype=torch.float64).cpu()
                self.counts[rule, pop][step, place] = kappas.isnan().logical_not().sum(dim=1).double().cpu()

    def add_rows(self, found: Found) -> None:
        """The mean over layers at every distance."""
        for (rule, pop), sums in self.sums.items():
            for step, distance in enumerate(DELTAS):
                counts = self.counts[rule, pop][step]
                if not counts.any():
                    continue
                mean = layered_ratio(sums[step], counts).mean
                if pop == RAW:
                    found.add_interval("overlap_distance", mean, layer=None, **rule.where, d=distance)
                    continue
                metric = "kappa_u" if pop is UNIFORM else "kappa_p"
                found.add_interval(metric, mean, layer=None, **rule.where, pop=pop, pairs="distance", d=distance)


def _read(setting: Setting) -> tuple[PrefixKappas, list[VarianceShares], _Distances]:
    reader, sink = setting.reader, setting.texts.sink_tokens
    ids = setting.texts.spread()
    levels = factor_levels(ids[:, sink:])
    length = ids.shape[1] - sink
    chance = {rule: setting.rates(rule) for rule in setting.rules}
    shape = (len(reader.layers), len(ids), len(PREFIXES), MAX_DELTA)
    kappas = {(rule, pop): torch.zeros(shape) for rule in setting.rules for pop in chance[rule]}
    shares: list[VarianceShares] = []
    distances = _Distances(len(reader.layers), len(ids), chance)

    def on_layer(place: int, a: Tensor) -> None:
        counted = a[:, sink:]
        for rule, rates in chance.items():
            masks = reader.masks(place, counted, rule)
            distances.add(place, rule, masks, ids[:, sink:], rates, reader.widths[place])
            for row, sequence in enumerate(counted):
                overlaps = prefix_overlaps(sequence, masks[row], rule.density, widths=reader.widths[place])
                for pop, rate in rates.items():
                    kappas[rule, pop][place, row] = overlaps.kappa(rate[place]).cpu()
        rows = [levels.rows(row * length, (row + 1) * length) for row in range(len(ids))]
        ffns = counted[..., : sum(reader.widths[place])].split(reader.widths[place], dim=-1)
        sums = ([variance_sums(*pair) for pair in zip(ffn, rows, strict=True)] for ffn in ffns)
        shares.append(variance_shares(*next(sums)) if len(ffns) == 1 else pooled_shares(sums))

    with setting.progress.task("inertia: prefixes and variance (SI1, SI3)", ids.numel(), "tokens") as advance:
        reader.read_all(ids, on_layer)
        advance(ids.numel())
    return kappas, shares, distances
