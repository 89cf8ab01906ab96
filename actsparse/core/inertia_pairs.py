"""Pairs of tokens within and between texts: sums of their overlaps above chance, and of what chance gives them.

The numbers behind SI2 (methods.md section 6). Our definitions [I]. Positions count after the sink tokens (the first
four), which have been dropped from every argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.overlap import MIN_ROOM, Chance, Rate, group_sizes

MIN_GAP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class InertiaPairs:
    """Sums and numbers of a quantity over pairs of tokens with different ids, of one layer and rung.

    `within`: two tokens of a sequence at least the gap apart, [sequences]. `equal`: two sequences at equal positions;
    `apart`: two sequences at positions at least the gap apart; both symmetric [sequences, sequences], diagonal 0.
    """

    within_sum: Float[Tensor, " sequences"]
    within_count: Float[Tensor, " sequences"]
    equal_sum: Float[Tensor, "sequences sequences"]
    equal_count: Float[Tensor, "sequences sequences"]
    apart_sum: Float[Tensor, "sequences sequences"]
    apart_count: Float[Tensor, "sequences sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChancePairs:
    """The pairs under one chance level: their kappas, and the overlaps that chance gives them (all that have one)."""

    kappas: InertiaPairs
    expected: InertiaPairs


def inertia_pairs(
    masks: Bool[Tensor, "sequences positions neurons"],
    tokens: Int[Tensor, "sequences positions"],
    rates: Sequence[Rate],
    *,
    min_gap: int = MIN_GAP,
) -> tuple[ChancePairs, ...]:
    """The pair sums behind W and B, once per chance level: 0 for raw overlaps, uniform, by popularity.

    One layer; the rates share the one expensive product and the groups. Pairs with an empty mask are left out.
    """
    sequences = len(tokens)
    numbers, tokens = masks.float(), tokens.to(masks.device)
    sizes = group_sizes(masks, next((rate.widths for rate in rates if isinstance(rate, Chance)), None)).float()
    # [rates, kappas and expected, sums and numbers, apart and equal, sequences, sequences], a triangle of each
    found = torch.zeros(len(rates), 2, 2, 2, sequences, sequences, dtype=torch.float64)
    for first in range(sequences):
        pairs = _TokenPairs.of(numbers[first:], sizes[first:], tokens[first:], min_gap)
        for measure, rate in enumerate(rates):
            expected = pairs.expected(rate)
            found[measure, 0, ..., first, first:] = pairs.of_kappas(expected)
            found[measure, 1, ..., first, first:] = pairs.sums(expected, pairs.counted)
    return tuple(ChancePairs(kappas=_whole(*kappas), expected=_whole(*expected)) for kappas, expected in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenPairs:
    """The tokens of some sequences, each with every token of the first of them: [sequences, positions, positions].

    `overlap` is 0 where a mask is empty; `counted` are the pairs of other tokens whose overlap is defined, `once` those
    of them that stand apart, each once. `sizes` are the sizes of the masks in every group, `smaller` that of a pair's
    smaller mask, `unit` the chance overlap at a rate of 1 (with one group |A| |B| / min is max(|A|, |B|)).
    """

    overlap: Float[Tensor, "sequences positions positions"]
    counted: Bool[Tensor, "sequences positions positions"]
    once: Bool[Tensor, "sequences positions positions"]
    sizes: Float[Tensor, "sequences positions groups"]
    smaller: Float[Tensor, "sequences positions positions"]
    unit: Float[Tensor, "sequences positions positions"]

    @classmethod
    def of(cls, numbers: Tensor, sizes: Tensor, tokens: Tensor, min_gap: int) -> "_TokenPairs":
        totals = sizes.sum(dim=-1)
        smaller = torch.minimum(totals[:, :, None], totals[0])
        counted = (tokens[:, :, None] != tokens[0]) & (smaller > 0)
        smaller.clamp_(min=1)
        order = torch.arange(tokens.shape[1], device=tokens.device)
        gap = order - order[:, None]
        once = counted & (gap.abs() >= min_gap)
        once[0] &= gap >= min_gap
        return cls(
            overlap=(numbers @ numbers[0].mT).div_(smaller),
            counted=counted,
            once=once,
            sizes=sizes,
            smaller=smaller,
            unit=(sizes @ sizes[0].mT).div_(smaller),
        )

    def expected(self, rate: Rate) -> Float[Tensor, "sequences positions positions"]:
        """The chance overlap of every pair."""
        if isinstance(rate, Chance):
            return ((self.sizes * rate.rates.to(self.sizes)) @ self.sizes[0].mT).div_(self.smaller)
        return self.unit * rate

    def of_kappas(self, expected: Tensor) -> Float[Tensor, "2 2 sequences"]:
        """`sums` of (o - E) / (1 - E), where E leaves room."""
        room = 1 - expected
        return self.sums((self.overlap - expected) / room.clamp(min=MIN_ROOM), room > MIN_ROOM)

    def sums(self, values: Tensor, defined: Bool[Tensor, "..."]) -> Float[Tensor, "2 2 sequences"]:
        """The sums and the numbers of these values over the defined pairs apart, and over those at equal positions."""
        found: list[Tensor] = []
        for chosen, of in (
            (self.once & defined, values),
            (_equal(self.counted) & _equal(defined), _equal(values)),
        ):
            total = (of * chosen).flatten(1).sum(dim=1, dtype=torch.float64)
            found.append(torch.stack([total, chosen.flatten(1).count_nonzero(dim=1)]))
        return torch.stack(found, dim=1).cpu()


def _equal(pairs: Tensor) -> Tensor:
    """Of pairs [sequences, positions, positions] those at equal positions."""
    return pairs.diagonal(dim1=1, dim2=2)


def _whole(
    sums: Float[Tensor, "2 sequences sequences"], counts: Float[Tensor, "2 sequences sequences"]
) -> InertiaPairs:
    """The sums of pairs (apart, at equal positions), of which one triangle is filled, on the diagonal within."""
    within_sum, within_count = (of[0].diagonal().clone() for of in (sums, counts))
    apart_sum, equal_sum, apart_count, equal_count = (half.triu(1) + half.triu(1).mT for half in (*sums, *counts))
    return InertiaPairs(
        within_sum=within_sum,
        within_count=within_count,
        equal_sum=equal_sum,
        equal_count=equal_count,
        apart_sum=apart_sum,
        apart_count=apart_count,
    )
