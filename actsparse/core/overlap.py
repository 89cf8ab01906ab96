"""Activation masks, how much two of them overlap, and how much of that is chance (methods.md section 4).

A mask is a bool vector over the neurons of a layer, at one token or for one sequence. Overlap alone misleads: at
density 0.5 two random masks share half of their neurons. So it is always corrected for a chance level, which has the
form `rate * max(|A|, |B|)`:

    uniform     rate = 1 / neurons                  every neuron equally likely           -> kappa_u
    popularity  rate = sum p_i^2 / (sum p_i)^2      neuron i likely as often as it fires  -> kappa_p
    none        rate = 0                            the raw overlap

kappa_u >> kappa_p says that masks agree because of a static hot set, which static pruning would use equally well.

In a mixture of experts the units are the neurons of all experts, an expert being a group of consecutive units; a token
keeps none of the groups that it is not routed to. Chance then knows the routing: it is that of masks that keep as many
units of every group (`Chance`). So what two tokens share by sharing experts alone is 0, and one group gives the above.

Undefined values (an empty mask; a chance level of 1 or more) are NaN in tensors, and every mean skips them.
The chance-corrected forms are our own definition [I].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.masks import kept_count, natively, row_threshold, top_mask

# Below this distance from 1 a chance level leaves nothing to correct, and float32 rounding would decide the sign.
MIN_ROOM = 1e-6


def topk_masks(scores: Float[Tensor, "*batch neurons"], density: float) -> Bool[Tensor, "*batch neurons"]:
    """Masks of the `kept_count` highest scores of each row; among equal scores the lower index is kept.

    Neuron masks rank |a| * ||w||. NaN ranks last. A ReLU row with fewer non-zeros than the count is filled up with
    its first zeros, which inflates overlaps: use exact masks (a != 0) beside these on ReLU models.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"a density lies in 0..1, got {density}")
    width = scores.shape[-1]
    count = kept_count(density, width)
    ranked = scores.detach().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if natively(ranked):
        return top_mask(ranked, count)
    threshold = row_threshold(ranked.reshape(-1, width), count).reshape(*scores.shape[:-1], 1)
    above = ranked > threshold
    tied = ranked == threshold
    missing = count - above.count_nonzero(dim=-1)
    if torch.equal(tied.count_nonzero(dim=-1), missing):
        return above | tied
    return above | (tied & (tied.cumsum(dim=-1) <= missing[..., None]))


def firing_counts(masks: Bool[Tensor, "*batch neurons"]) -> Int[Tensor, " neurons"]:
    """In how many masks each neuron is active; counts of two parts of a text add up to those of the whole."""
    return masks.reshape(-1, masks.shape[-1]).count_nonzero(dim=0)


def uniform_rate(neurons: int) -> float:
    """Chance overlap per kept neuron when every neuron is equally likely: 1 / neurons."""
    return 1 / neurons


# Widths of the groups of consecutive units that a layer consists of: its neurons, or those of each expert.
Widths = tuple[int, ...]


def group_sizes(masks: Bool[Tensor, "*batch units"], widths: Widths | None = None) -> Int[Tensor, "*batch groups"]:
    """How many units of each group a mask keeps; units behind the last group are none."""
    parts = [masks] if widths is None else masks[..., : sum(widths)].split(widths, dim=-1)
    return torch.stack([part.count_nonzero(dim=-1) for part in parts], dim=-1)


def squared_sizes(masks: Bool[Tensor, "*batch units"], widths: Widths | None = None) -> Int[Tensor, " groups"]:
    """The sum over all masks of the squared number of units that they keep in each group; adds up like counts."""
    return group_sizes(masks, widths).flatten(0, -2).square().sum(dim=0)


def popularity_rate(
    counts: Int[Tensor, "*layers neurons"], squares: Int[Tensor, "*layers"]
) -> Float[Tensor, "*layers"]:
    """Chance overlap per kept neuron when neuron i is as likely as it is popular: sum p_i^2 / (sum p_i)^2.

    `counts` are the `firing_counts` of some masks and `squares` their `squared_sizes`. About 1/neurons (all equally
    popular) to 1 (one neuron only); NaN where fewer than two masks keep anything. Unbiased for independent masks of
    one size, however few; of several sizes both sums are. Our definition [I].
    """
    # p_i^2 is the chance that neuron i fires at two unrelated tokens, and the share of all n^2 pairs of n tokens at
    # which it does, (c_i / n)^2, is too large by p_i (1 - p_i) / n, since it pairs each token with itself. Over the
    # n (n - 1) pairs of different tokens, c_i (c_i - 1) / (n (n - 1)) is not. Likewise (sum p_i)^2 is the mean
    # product of the sizes |A_s| |A_t| over these pairs, ((sum c_i)^2 - sum_t |A_t|^2) / (n (n - 1)): n cancels.
    # With all masks of one size the denominator is exactly that size squared.
    fired = counts.double()
    total = fired.sum(dim=-1)
    return (fired.square().sum(dim=-1) - total) / (total.square() - squares.to(total))


@dataclass(frozen=True)
class Chance:
    """The overlap that unrelated masks of the same size in each group have: sum_g rate_g |A_g| |B_g| / min(|A|, |B|).

    `rates` [groups] are uniform or by popularity, each within its group. Our own definition [I].
    """

    rates: Float[Tensor, " groups"]
    widths: Widths

    @classmethod
    def uniform(cls, widths: Widths) -> "Chance":
        """Every unit of a group as likely as the others."""
        return cls(torch.tensor([uniform_rate(width) for width in widths], dtype=torch.float64), widths)

    @classmethod
    def by_popularity(cls, counts: Int[Tensor, " units"], squares: Int[Tensor, " groups"], widths: Widths) -> "Chance":
        """A unit as likely as it fires, within its group; uniform in a group that fires at fewer than two tokens."""
        parts = zip(counts[: sum(widths)].split(widths), squares[: len(widths)], strict=True)
        rates = torch.stack([popularity_rate(*part) for part in parts]).cpu()
        return cls(torch.where(rates.isnan(), cls.uniform(widths).rates, rates), widths)


# The chance level of a layer: the rate of its only group, or that of every group. Of layers one for all, or one each.
Rate = float | Chance
Rates = float | Float[Tensor, " layers"] | Sequence[Rate]


def of_layers(rates: Rates, layers: int) -> list[Rate]:
    """The rate of each layer."""
    if isinstance(rates, Sequence):
        return list(rates)
    return list(torch.as_tensor(rates).expand(layers).tolist())


def widths_of(rate: Rate) -> Widths | None:
    """The groups that a chance level knows; None for a layer of one."""
    return rate.widths if isinstance(rate, Chance) else None


def mean_chance(masks: Bool[Tensor, "*batch units"], rate: Rate) -> float:
    """The mean chance overlap of all pairs of these masks; NaN of fewer than two."""
    if not isinstance(rate, Chance):
        return rate * mean_larger(masks)
    sizes = group_sizes(masks.flatten(0, -2), rate.widths).double()
    totals = sizes.sum(dim=-1)
    expected = (sizes * rate.rates.to(sizes.device)) @ sizes.mT / torch.minimum(totals[:, None], totals[None, :])
    expected.fill_diagonal_(math.nan)
    return float(expected.nanmean())


def mean_larger(masks: Bool[Tensor, "*batch neurons"]) -> float:
    """The mean of max(|A|, |B|) over all pairs of these masks, which times a rate is their mean chance overlap.

    The common size where all are equally large; NaN of fewer than two masks.
    """
    sizes = masks.count_nonzero(dim=-1).flatten().double().sort().values
    pairs = len(sizes) * (len(sizes) - 1) / 2
    # the i-th smallest is the larger one of i pairs
    larger = sizes @ torch.arange(len(sizes), dtype=torch.float64, device=sizes.device)
    return float(larger) / pairs if pairs else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaps:
    """Overlaps of pairs of masks: `overlap` = |A n B| / min(|A|, |B|), and by group |A_g| |B_g| / min(|A|, |B|).

    `overlap` lies in 0..1 and is NaN where a mask is empty. With one group `sizes` is max(|A|, |B|).
    """

    overlap: Float[Tensor, "*pairs"]
    sizes: Float[Tensor, "*pairs groups"]

    def chance(self, rate: Rate | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The expected overlap of unrelated masks of these sizes."""
        if isinstance(rate, Chance):
            return self.sizes @ rate.rates.to(self.sizes)
        return self.sizes.sum(dim=-1) * torch.as_tensor(rate).to(self.sizes)

    def expected(self, rate: Rate) -> Float[Tensor, "*pairs"]:
        """`chance` where there is an overlap that it belongs to, NaN elsewhere."""
        return torch.where(self.overlap.isnan(), math.nan, self.chance(rate))

    def kappa(self, rate: Rate | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Overlap above chance, (o - E) / (1 - E) with E from `chance`.

        1: identical masks (or one inside the other); 0: what chance gives; below 0: they avoid each other. NaN where
        o is, or where E reaches 1. A rate without groups broadcasts against the pairs. Our definition [I].
        """
        chance = self.chance(rate)
        room = 1 - chance
        return torch.where(room > MIN_ROOM, (self.overlap - chance) / room, math.nan)

    def only(self, pairs: Bool[Tensor, "*pairs"]) -> "Overlaps":
        """The same with every unmarked pair undefined."""
        return Overlaps(overlap=torch.where(pairs, self.overlap, math.nan), sizes=self.sizes)


def paired_overlaps(
    first: Bool[Tensor, "*batch units"], second: Bool[Tensor, "*batch units"], widths: Widths | None = None
) -> Overlaps:
    """Overlaps of `first[i]` with `second[i]`, for every i."""
    shared = (first & second).count_nonzero(dim=-1).float()
    left, right = (group_sizes(masks, widths).float() for masks in (first, second))
    return _overlaps(shared, left, right)


def pairwise_overlaps(
    rows: Bool[Tensor, "*batch rows units"], columns: Bool[Tensor, "*batch columns units"], widths: Widths | None = None
) -> Overlaps:
    """Overlaps of every mask of `rows` with every mask of `columns`: [*batch, rows, columns]."""
    shared = rows.float() @ columns.float().mT
    left, right = (group_sizes(masks, widths).float() for masks in (rows, columns))
    return _overlaps(shared, left[..., :, None, :], right[..., None, :, :])


def _overlaps(shared: Tensor, first: Tensor, second: Tensor) -> Overlaps:
    smaller = torch.minimum(first.sum(dim=-1), second.sum(dim=-1))
    one_group = first.shape[-1] == 1
    sizes = torch.maximum(first, second) if one_group else first * second / smaller.clamp(min=1)[..., None]
    # 0 / 0, where one of the masks is empty, is the NaN that stands for "undefined".
    return Overlaps(overlap=shared / smaller, sizes=sizes)
