"""SI1 and SI3 on whole blocks: one pass, each layer reduced at once (methods.md section 6)."""

from collections import defaultdict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.bootstrap import SumAndCount, layered_ratio, mean_of, sum_and_count
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
    """Overlaps of two tokens of a sequence that stand `d` positions apart and have different ids, by d.

    `kappas` and `expected` are sums and numbers, layer after layer, by rule, chance level and distance.
    """

    def __init__(self) -> None:
        self.kappas: dict[tuple[MaskRule, str | None, int], list[SumAndCount]] = defaultdict(list)
        self.expected: dict[tuple[MaskRule, str | None, int], list[SumAndCount]] = defaultdict(list)

    def add(
        self,
        rule: MaskRule,
        masks: Bool[Tensor, "sequences positions units"],
        ids: Int[Tensor, "sequences positions"],
        rates: dict[str | None, Rate],
        widths: Widths,
    ) -> None:
        """Add the sequences of the next layer."""
        for distance in DELTAS:
            if distance >= ids.shape[1]:
                continue
            different = (ids[:, distance:] != ids[:, :-distance]).to(masks.device)
            pairs = paired_overlaps(masks[:, distance:], masks[:, :-distance], widths).only(different)
            self.kappas[rule, RAW, distance].append(sum_and_count(pairs.overlap))
            for pop, rate in rates.items():
                self.kappas[rule, pop, distance].append(sum_and_count(pairs.kappa(rate)))
                self.expected[rule, pop, distance].append(sum_and_count(pairs.expected(rate)))

    def add_rows(self, found: Found) -> None:
        """The mean over layers at every distance."""
        for (rule, pop, distance), layers in self.kappas.items():
            if not any(counts.any() for _, counts in layers):
                continue
            mean = mean_of(layers).mean
            if pop == RAW:
                found.add_interval("overlap_distance", mean, layer=None, **rule.where, d=distance)
                continue
            where = {**rule.where, "pop": pop, "pairs": "distance", "d": distance}
            found.add_interval("kappa_u" if pop is UNIFORM else "kappa_p", mean, layer=None, **where)
            chance = mean_of(self.expected[rule, pop, distance]).mean
            found.add("e_uniform" if pop is UNIFORM else "e_pop", chance.value, chance.n, layer=None, **where)


def _read(setting: Setting) -> tuple[PrefixKappas, list[VarianceShares], _Distances]:
    reader, sink = setting.reader, setting.texts.sink_tokens
    ids = setting.texts.spread()
    levels = factor_levels(ids[:, sink:])
    length = ids.shape[1] - sink
    chance = {rule: setting.rates(rule) for rule in setting.rules}
    shape = (len(reader.layers), len(ids), len(PREFIXES), MAX_DELTA)
    kappas = {(rule, pop): torch.zeros(shape) for rule in setting.rules for pop in chance[rule]}
    shares: list[VarianceShares] = []
    distances = _Distances()

    def on_layer(place: int, a: Tensor) -> None:
        counted = a[:, sink:]
        for rule, rates in chance.items():
            masks = reader.masks(place, counted, rule)
            of_layer = {pop: rate[place] for pop, rate in rates.items()}
            distances.add(rule, masks, ids[:, sink:], of_layer, reader.widths[place])
            for row, sequence in enumerate(counted):
                overlaps = prefix_overlaps(sequence, masks[row], rule.density, widths=reader.widths[place])
                for pop, rate in of_layer.items():
                    kappas[rule, pop][place, row] = overlaps.kappa(rate).cpu()
        rows = [levels.rows(row * length, (row + 1) * length) for row in range(len(ids))]
        ffns = counted[..., : sum(reader.widths[place])].split(reader.widths[place], dim=-1)
        sums = ([variance_sums(*pair) for pair in zip(ffn, rows, strict=True)] for ffn in ffns)
        shares.append(variance_shares(*next(sums)) if len(ffns) == 1 else pooled_shares(sums))

    with setting.progress.task("inertia: prefixes and variance (SI1, SI3)", ids.numel(), "tokens") as advance:
        reader.read_all(ids, on_layer)
        advance(ids.numel())
    return kappas, shares, distances
