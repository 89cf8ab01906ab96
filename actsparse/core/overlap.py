"""Activation masks, how much two of them overlap, and how much of that is chance (methods.md section 4).

A mask is a bool vector over the neurons of a layer, at one token or for one sequence. Overlap alone misleads: at
density 0.5 two random masks share half of their neurons. So it is always corrected for a chance level, which has the
form `rate * max(|A|, |B|)`:

    uniform     rate = 1 / neurons                  every neuron equally likely           -> kappa_u
    popularity  rate = sum p_i^2 / (sum p_i)^2      neuron i likely as often as it fires  -> kappa_p
    none        rate = 0                            the raw overlap

kappa_u >> kappa_p says that masks agree because of a static hot set, which static pruning would use equally well.

Undefined values (an empty mask; a chance level of 1 or more) are NaN in tensors, and every mean skips them.
The chance-corrected forms are our own definition [I].
"""

import math
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


def popularity_rate(
    popularity: Float[Tensor, "*layers neurons"] | Int[Tensor, "*layers neurons"],
) -> Float[Tensor, "*layers"]:
    """Chance overlap per kept neuron when neuron i is as likely as it is popular: sum p_i^2 / (sum p_i)^2.

    `popularity` is how often each neuron fires, as counts or shares (the scale cancels). Between 1/neurons (all
    equally popular) and 1 (one neuron only); NaN where nothing ever fired. Our definition [I].
    """
    weights = popularity.double()
    return weights.square().sum(dim=-1) / weights.sum(dim=-1).square()


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
    """Overlaps of pairs of masks: `overlap` = |A n B| / min(|A|, |B|) and `larger` = max(|A|, |B|), one per pair.

    `overlap` lies in 0..1 and is NaN where a mask is empty.
    """

    overlap: Float[Tensor, "*pairs"]
    larger: Float[Tensor, "*pairs"]

    def chance(self, rate: float | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The expected overlap of unrelated masks of these sizes: rate * max(|A|, |B|)."""
        return self.larger * torch.as_tensor(rate, dtype=self.larger.dtype, device=self.larger.device)

    def kappa(self, rate: float | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Overlap above chance, (o - E) / (1 - E) with E = rate * max(|A|, |B|).

        1: identical masks (or one inside the other); 0: what chance gives; below 0: they avoid each other. NaN where
        o is, or where E reaches 1. `rate` broadcasts against the pairs. Our definition [I].
        """
        chance = self.chance(rate)
        room = 1 - chance
        return torch.where(room > MIN_ROOM, (self.overlap - chance) / room, math.nan)

    def only(self, pairs: Bool[Tensor, "*pairs"]) -> "Overlaps":
        """The same with every unmarked pair undefined."""
        return Overlaps(overlap=torch.where(pairs, self.overlap, math.nan), larger=self.larger)


def paired_overlaps(first: Bool[Tensor, "*batch neurons"], second: Bool[Tensor, "*batch neurons"]) -> Overlaps:
    """Overlaps of `first[i]` with `second[i]`, for every i."""
    shared, left, right = (masks.count_nonzero(dim=-1).float() for masks in (first & second, first, second))
    return _overlaps(shared, left, right)


def pairwise_overlaps(
    rows: Bool[Tensor, "*batch rows neurons"], columns: Bool[Tensor, "*batch columns neurons"]
) -> Overlaps:
    """Overlaps of every mask of `rows` with every mask of `columns`: [*batch, rows, columns]."""
    left, right = rows.float(), columns.float()
    return _overlaps(left @ right.mT, left.sum(dim=-1)[..., :, None], right.sum(dim=-1)[..., None, :])


def _overlaps(shared: Tensor, first: Tensor, second: Tensor) -> Overlaps:
    # 0 / 0, where one of the masks is empty, is the NaN that stands for "undefined".
    return Overlaps(overlap=shared / torch.minimum(first, second), larger=torch.maximum(first, second))
