"""Confidence intervals by resampling whole sequences (methods.md section 4).

Tokens of one sequence are not independent, so sequences are what is drawn, with replacement. A resample is a row of
weights: how often each sequence was drawn. Every statistic here is a function of weighted sums, so all resamples are
one matrix product. Two statistics given the same seed and number of sequences use the same draws, so that their
differences and ratios are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIN_RESAMPLES = 200
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A statistic of `n` sequences with its percentile bootstrap interval and standard error.

    `value` is None where the statistic is undefined; `low`, `high` and `stderr` are None where it could not be
    resampled (fewer than two sequences).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    stderr: float | None

    def touches(self, number: float) -> bool:
        """Whether `number` lies inside the interval; an undefined interval touches everything."""
        return self.low is None or self.high is None or self.low <= number <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIntervals:
    """One statistic in every layer, and of the mean over the layers in which it is defined."""

    layers: tuple[Interval, ...]
    mean: Interval


def resample_weights(
    sequences: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "resamples sequences"]:
    """How often each sequence is drawn in each resample of `sequences` draws with replacement; float64, on the CPU."""
    return stratified_weights(torch.zeros(sequences, dtype=torch.long), resamples=resamples, seed=seed)


def stratified_weights(
    strata: Int[Tensor, " sequences"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "resamples sequences"]:
    """As `resample_weights`, with every stratum resampled within itself, so that its size never changes."""
    if resamples < MIN_RESAMPLES:
        raise ValueError(f"a bootstrap needs at least {MIN_RESAMPLES} resamples, got {resamples}")
    generator = torch.Generator().manual_seed(seed)
    strata = strata.cpu()
    weights = torch.zeros(resamples, strata.numel(), dtype=torch.float64)
    for stratum in strata.unique():
        members = (strata == stratum).nonzero().flatten()
        drawn = members[torch.randint(members.numel(), (resamples, members.numel()), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return weights


def interval(value: float, samples: Float[Tensor, " resamples"], n: int, *, level: float = LEVEL) -> Interval:
    """The percentile interval of `samples` around `value`; resamples in which it is undefined (NaN) are left out."""
    defined = samples[samples.isfinite()].double()
    known = math.isfinite(value)
    if not known or n < 2 or defined.numel() < 2:
        return Interval(value=value if known else None, low=None, high=None, n=n, stderr=None)
    tail = (1 - level) / 2
    low, high = torch.quantile(defined, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value=value, low=low, high=high, n=n, stderr=float(defined.std()))


def layer_intervals(
    values: Float[Tensor, " layers"], samples: Float[Tensor, "resamples layers"], n: int, *, level: float = LEVEL
) -> LayerIntervals:
    """Intervals of every layer and of the layer mean, from resamples that all layers share."""
    return LayerIntervals(
        layers=tuple(interval(value, samples[:, layer], n, level=level) for layer, value in enumerate(values.tolist())),
        mean=interval(float(values.nanmean()), samples.nanmean(dim=1), n, level=level),
    )


def bootstrap_mean(
    values: Float[Tensor, " sequences"], *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """The mean over sequences; those whose value is NaN are left out."""
    return bootstrap_ratio(values, torch.ones_like(values), resamples=resamples, seed=seed, level=level)


def bootstrap_ratio(
    numerators: Float[Tensor, " sequences"],
    denominators: Float[Tensor, " sequences"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The ratio of means, sum(numerators) / sum(denominators): per-token means when the denominators count tokens.

    Sequences with a NaN in either are left out.
    """
    kept = ~(numerators.isnan() | denominators.isnan())
    above, below = numerators[kept].double().cpu(), denominators[kept].double().cpu()
    weights = resample_weights(int(kept.sum()), resamples=resamples, seed=seed)
    value = float(above.sum() / below.sum())
    return interval(value, (weights @ above) / (weights @ below), above.numel(), level=level)


def bootstrap_difference(
    first: Float[Tensor, " sequences"],
    second: Float[Tensor, " sequences"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The mean of first - second over the same sequences (paired); pairs with a NaN are left out."""
    return bootstrap_mean(first.double() - second.double(), resamples=resamples, seed=seed, level=level)


def layered_ratio(
    sums: Float[Tensor, "layers sequences"],
    counts: Float[Tensor, "layers sequences"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> LayerIntervals:
    """Per layer sum(sums) / sum(counts) over the sequences; all layers share the resamples."""
    above, below = sums.double().cpu(), counts.double().cpu()
    sequences = above.shape[-1]
    weights = resample_weights(sequences, resamples=resamples, seed=seed)
    samples = (weights @ above.mT) / (weights @ below.mT)
    return layer_intervals(above.sum(dim=-1) / below.sum(dim=-1), samples, sequences, level=level)


# The sum of a quantity over the pairs (or tokens) of each sequence, and their number: [sequences] each.
SumAndCount = tuple[Float[Tensor, " sequences"], Float[Tensor, " sequences"]]


def sum_and_count(values: Float[Tensor, "sequences pairs"]) -> SumAndCount:
    """The sum and the number of the values that are not NaN, of each sequence; float64, on the CPU."""
    return values.nansum(dim=1, dtype=torch.float64).cpu(), values.isnan().logical_not().sum(dim=1).double().cpu()


def mean_of(layers: Sequence[SumAndCount], *, resamples: int = RESAMPLES, seed: int = 0) -> LayerIntervals:
    """The mean over all that was counted, in every layer; sequences are resampled."""
    sums, counts = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return layered_ratio(sums, counts, resamples=resamples, seed=seed)


def weighted_pair_means(
    values: Float[Tensor, "layers sequences sequences"], weights: Float[Tensor, "resamples sequences"]
) -> Float[Tensor, "resamples layers"]:
    """Per resample the weighted mean over pairs of different sequences, sum w_i w_j v_ij / sum w_i w_j.

    Pairs whose value is NaN are left out; so is a sequence paired with its own copy, which would only measure that
    it is identical to itself. A row of ones as weights gives the plain mean over pairs.
    """
    off_diagonal = ~torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    valid = off_diagonal & ~values.isnan()
    return weighted_pair_ratio(torch.where(valid, values, 0.0), valid.double(), weights)


def weighted_pair_ratio(
    sums: Float[Tensor, "layers sequences sequences"],
    counts: Float[Tensor, "layers sequences sequences"],
    weights: Float[Tensor, "resamples sequences"],
) -> Float[Tensor, "resamples layers"]:
    """As `weighted_pair_means`, from the sum and number of values of every pair of sequences."""
    return _quadratic(sums, weights) / _quadratic(counts, weights)


def _quadratic(matrices: Tensor, weights: Tensor) -> Tensor:
    """w' M w for every row w of weights and every matrix M: [resamples, layers]."""
    return ((weights @ matrices.double().cpu()) * weights).sum(dim=-1).mT
