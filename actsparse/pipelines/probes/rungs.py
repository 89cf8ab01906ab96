"""SI2 and the overlaps behind it, on every rung of the input ladder (methods.md sections 4 and 6)."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.bootstrap import LayerIntervals, SumAndCount, mean_of, sum_and_count
from actsparse.core.inertia import Inertia, semantics_ratio, si2
from actsparse.core.inertia_pairs import ChancePairs, InertiaPairs, inertia_pairs
from actsparse.core.ladder import Rung, input_ladder
from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Overlaps, Rate, Widths, mean_chance, paired_overlaps
from actsparse.pipelines.probes.popularity import popular
from actsparse.pipelines.probes.setting import NATURAL, OWN, UNIFORM, Found, Setting

# A raw overlap is a kappa whose chance rate is 0.
RAW = "raw"
MEASURES = (RAW, UNIFORM, NATURAL, OWN)


@dataclass
class LevelPairs:
    """What one chance level makes of a rung, layer after layer: kappas of pairs of tokens, and the overlaps that it
    gives them; of neighbours by sequence, and in the mean of all pairs of the rung's tokens."""

    pairs: list[ChancePairs] = field(default_factory=list)
    neighbours: list[SumAndCount] = field(default_factory=list)
    expected_neighbours: list[SumAndCount] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)

    def add(self, pairs: ChancePairs, neighbours: Overlaps, rate: Rate, expected: float) -> None:
        """Add the next layer."""
        self.pairs.append(pairs)
        self.neighbours.append(sum_and_count(neighbours.kappa(rate)))
        self.expected_neighbours.append(sum_and_count(neighbours.expected(rate)))
        self.expected.append(expected)


# The chance levels of a rung in the masks of one rule, by measure.
RungPairs = dict[str | None, LevelPairs]


def add_layer(
    seen: RungPairs,
    masks: Bool[Tensor, "sequences positions neurons"],
    tokens: Int[Tensor, "sequences positions"],
    rates: dict[str | None, Rate],
    widths: Widths,
) -> None:
    """Add the next layer of a rung."""
    different = (tokens[:, 1:] != tokens[:, :-1]).to(masks.device)
    neighbours = paired_overlaps(masks[:, 1:], masks[:, :-1], widths).only(different)
    for (name, rate), pairs in zip(rates.items(), inertia_pairs(masks, tokens, list(rates.values())), strict=True):
        seen[name].add(pairs, neighbours, rate, mean_chance(masks.flatten(0, 1), rate))


def add_si2(setting: Setting, found: Found) -> None:
    """Rows of overlaps, kappas, `si2_j`, `e_uniform`, `e_pop` and `sir`."""
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
            random, real = (_kappas(read[rung][rule][pop]) for rung in (Rung.UNIFORM_RANDOM, Rung.NATURAL))
            found.add_interval("sir", semantics_ratio(random, real), layer=None, **rule.where, pop=pop)


def _read(setting: Setting, ids: Int[Tensor, "sequences positions"]) -> dict[MaskRule, RungPairs]:
    """One pass over all sequences of a rung; every layer is reduced to sums over pairs at once."""
    reader, sink = setting.reader, setting.texts.sink_tokens
    seen: dict[MaskRule, RungPairs] = {rule: {name: LevelPairs() for name in MEASURES} for rule in setting.rules}
    chance = {rule: setting.rates(rule) for rule in setting.rules}

    def on_layer(place: int, a: Float[Tensor, "sequences positions neurons"]) -> None:
        for rule, pairs in seen.items():
            masks = reader.masks(place, a[:, sink:], rule)
            widths = reader.widths[place]
            rates: dict[str | None, Rate] = {RAW: 0.0} | {pop: rates[place] for pop, rates in chance[rule].items()}
            rates[OWN] = popular(masks, widths)
            add_layer(pairs, masks, ids[:, sink:], rates, widths)

    reader.read_all(ids, on_layer)
    return seen


def _add_rung(found: Found, rung: Rung, rule: MaskRule, seen: RungPairs) -> None:
    for name, level in seen.items():
        inertia = si2(_kappas(level))
        neighbour = mean_of(level.neighbours)
        where = {**rule.where, "rung": rung}
        if name == RAW:
            found.add_layers("overlap_w", inertia.within, **where)
            found.add_layers("overlap_b", inertia.between, **where)
            found.add_layers("overlap_b_apart", inertia.between_apart, **where)
            found.add_layers("overlap_neighbour", neighbour, **where)
            continue
        where["pop"] = name
        kappa = "kappa_u" if name is UNIFORM else "kappa_p"
        for pairs, values in _by_pairs(inertia, neighbour).items():
            found.add_layers(kappa, values, **where, pairs=pairs)
        found.add_layers("si2_j", inertia.excess, **where)
        metric = "e_uniform" if name is UNIFORM else "e_pop"
        mean = sum(level.expected) / len(level.expected)
        for layer, value in zip((*found.layers, None), (*level.expected, mean), strict=True):
            found.add(metric, value, inertia.within.mean.n, layer=layer, **where)
        expected = si2([pairs.expected for pairs in level.pairs])
        for pairs, values in _by_pairs(expected, mean_of(level.expected_neighbours)).items():
            found.add_values(metric, values, **where, pairs=pairs)


def _kappas(level: LevelPairs) -> list[InertiaPairs]:
    return [pairs.kappas for pairs in level.pairs]


def _by_pairs(inertia: Inertia, neighbour: LayerIntervals) -> dict[str, LayerIntervals]:
    return {
        "within": inertia.within,
        "between": inertia.between,
        "between-apart": inertia.between_apart,
        "neighbour": neighbour,
    }
