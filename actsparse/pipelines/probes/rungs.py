"""SI2 and the overlaps behind it, on every rung of the input ladder (methods.md sections 4 and 6)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.bootstrap import LayerIntervals, layered_ratio
from actsparse.core.inertia import Inertia, InertiaPairs, inertia_pairs, semantics_ratio, si2
from actsparse.core.ladder import Rung, input_ladder
from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Rate, Widths, firing_counts, mean_chance, paired_overlaps
from actsparse.pipelines.probes.popularity import popular
from actsparse.pipelines.probes.setting import NATURAL, OWN, UNIFORM, Found, Setting

# A raw overlap is a kappa whose chance rate is 0.
RAW = "raw"
MEASURES = (RAW, UNIFORM, NATURAL, OWN)


@dataclass
class RungPairs:
    """What one rung shows in the masks of one rule, layer after layer.

    `pairs` and the neighbour sums go by the measure; `expected` are the chance overlaps of both popularities.
    """

    pairs: dict[str | None, list[InertiaPairs]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    neighbour_sums: dict[str | None, list[Tensor]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    neighbour_counts: dict[str | None, list[Tensor]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    expected: dict[str | None, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES[1:]})

    def add(
        self,
        masks: Bool[Tensor, "sequences positions neurons"],
        tokens: Int[Tensor, "sequences positions"],
        rates: dict[str | None, Rate],
        widths: Widths,
    ) -> None:
        """Add the next layer."""
        for name, pairs in zip(rates, inertia_pairs(masks, tokens, list(rates.values())), strict=True):
            self.pairs[name].append(pairs)
        different = (tokens[:, 1:] != tokens[:, :-1]).to(masks.device)
        neighbours = paired_overlaps(masks[:, 1:], masks[:, :-1], widths).only(different)
        for name, rate in rates.items():
            kappas = neighbours.kappa(rate)
            self.neighbour_sums[name].append(kappas.nansum(dim=1, dtype=torch.float64).cpu())
            self.neighbour_counts[name].append(kappas.isnan().logical_not().sum(dim=1).cpu())
            if name != RAW:
                self.expected[name].append(mean_chance(masks.flatten(0, 1), rate))


def add_si2(setting: Setting, found: Found) -> None:
    """Rows of overlaps, kappas, `si2_j`, `e_pop` and `sir`."""
    texts = setting.texts
    natural = texts.spread()[:, : texts.prompt_length]
    ladder = input_ladder(natural, texts.ends(natural), texts.ordinary, seed=texts.seed)
    read: dict[Rung, dict[MaskRule, RungPairs]] = {}
    with setting.progress.task(
        "inertia: texts that lose meaning (SI2)", natural.numel() * len(ladder), "tokens"
    ) as advance:
        for rung, ids in ladder.items():
            read[rung] = _read(setting, ids)
            advance(ids.numel())
    for rung, by_rule in read.items():
        for rule, seen in by_rule.items():
            _add_rung(found, rung, rule, seen)
    for rule in setting.rules:
        for pop in MEASURES[1:]:
            random, real = (read[rung][rule].pairs[pop] for rung in (Rung.UNIFORM_RANDOM, Rung.NATURAL))
            found.add_interval("sir", semantics_ratio(random, real), layer=None, **rule.where, pop=pop)


def _read(setting: Setting, ids: Int[Tensor, "sequences positions"]) -> dict[MaskRule, RungPairs]:
    """One pass over all sequences of a rung; every layer is reduced to sums over pairs at once."""
    reader, sink = setting.reader, setting.texts.sink_tokens
    seen = {rule: RungPairs() for rule in setting.rules}
    chance = {rule: setting.rates(rule) for rule in setting.rules}

    def on_layer(place: int, a: Float[Tensor, "sequences positions neurons"]) -> None:
        for rule, pairs in seen.items():
            masks = reader.masks(place, a[:, sink:], rule)
            widths = reader.widths[place]
            rates: dict[str | None, Rate] = {RAW: 0.0} | {pop: rates[place] for pop, rates in chance[rule].items()}
            rates[OWN] = popular(firing_counts(masks), widths)
            pairs.add(masks, ids[:, sink:], rates, widths)

    reader.read_all(ids, on_layer)
    return seen


def _add_rung(found: Found, rung: Rung, rule: MaskRule, seen: RungPairs) -> None:
    for name in MEASURES:
        inertia = si2(seen.pairs[name])
        sums, counts = (torch.stack(parts[name]) for parts in (seen.neighbour_sums, seen.neighbour_counts))
        neighbour = layered_ratio(sums.double(), counts.double())
        where = {**rule.where, "rung": rung}
        if name == RAW:
            found.add_layers("overlap_w", inertia.within, **where)
            found.add_layers("overlap_b", inertia.between, **where)
            found.add_layers("overlap_b_apart", inertia.between_apart, **where)
            found.add_layers("overlap_neighbour", neighbour, **where)
            continue
        kappa = "kappa_u" if name is UNIFORM else "kappa_p"
        for pairs, values in _pairs(inertia).items():
            found.add_layers(kappa, values, **where, pop=name, pairs=pairs)
        found.add_layers(kappa, neighbour, **where, pop=name, pairs="neighbour")
        found.add_layers("si2_j", inertia.excess, **where, pop=name)
        expected = seen.expected[name]
        metric = "e_uniform" if name is UNIFORM else "e_pop"
        for layer, value in zip((*found.layers, None), (*expected, sum(expected) / len(expected)), strict=True):
            found.add(metric, value, inertia.within.mean.n, layer=layer, **where, pop=name)


def _pairs(inertia: Inertia) -> dict[str, LayerIntervals]:
    return {"within": inertia.within, "between": inertia.between, "between-apart": inertia.between_apart}
