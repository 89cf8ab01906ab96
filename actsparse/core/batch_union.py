"""How many neurons a decode step of a batch needs at all: the union of its tokens' masks (methods.md section 6).

Neuron sparsity pays in a batch only while the union stays small. A batch takes one random token of each of B random
sequences, as a server that decodes B requests at different positions; only when sequences run out does it take a
second token of each, and so on. The mean over all such batches is a polynomial in how often each neuron fires in each
sequence, so that it is computed, not drawn. Our definition [I].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.bootstrap import RESAMPLES, Interval, LayerIntervals, layered_ratio


def union_blocks(blocks: int, sequences: int) -> list[int]:
    """At most so many blocks, spread evenly over all of a text: block floor(i * blocks / sequences) for every i."""
    return [place * blocks // sequences for place in range(sequences)] if blocks > sequences else list(range(blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchUnion:
    """Share of neurons (0..1) that at least one of B tokens uses, for B = 1 .. len(measured).

    `measured[B-1]`: mean over all batches. `independent`: mean_i 1 - (1 - p_i)^B, tokens drawn independently from
    neurons as popular as these. `uniform`: 1 - (1 - p)^B with p the mean density, as if all neurons were equally
    popular. Measured below independent: tokens of a batch share more than the hot set. Independent below uniform:
    the hot set is what keeps the union small. Beyond B = `sequences` a batch holds several tokens of one sequence.

    `by_sequence[B-1]`: what each sequence contributes, n U - (n - 1) U without it (the jackknife's pseudo-values).
    Their mean is `measured[B-1]` and resampling them gives its interval, to first order: drawing sequences with
    replacement instead would put copies of one into a batch and make unions smaller. NaN where a batch takes all.
    """

    measured: tuple[float, ...]
    independent: tuple[float, ...]
    uniform: tuple[float, ...]
    by_sequence: Float[Tensor, "batches sequences"]
    tokens: int
    sequences: int


def batch_union(fired: Int[Tensor, "sequences neurons"], tokens: int, *, max_batch: int = 64) -> BatchUnion:
    """The union density of batches of 1 .. max_batch tokens of one layer, against two predictions.

    `fired` counts at how many of `tokens` tokens of each sequence a neuron is active. B ends at the number of all
    tokens.
    """
    sequences = len(fired)
    silent = tokens - fired.double()
    largest = min(max_batch, sequences * tokens)
    measured: list[float] = []
    for taken in range(-(-largest // sequences)):
        missed = _subset_means(_missed(silent, tokens, taken), _missed(silent, tokens, taken + 1))
        measured += (1 - missed[1:].mean(dim=-1)).tolist()
    popularity = 1 - silent.mean(dim=0) / tokens
    batches = range(1, largest + 1)
    return BatchUnion(
        measured=tuple(measured[:largest]),
        independent=tuple(float((1 - (1 - popularity) ** batch).mean()) for batch in batches),
        uniform=tuple(float(1 - (1 - popularity.mean()) ** batch) for batch in batches),
        by_sequence=_pseudo_values(silent / tokens, measured, largest),
        tokens=sequences * tokens,
        sequences=sequences,
    )


def layer_unions(
    layers: Sequence[BatchUnion], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[LayerIntervals, ...]:
    """The measured union of every layer and of their mean for B = 1, 2 .., with intervals over sequences.

    Without an interval where a batch takes all sequences.
    """
    found: list[LayerIntervals] = []
    for place, values in enumerate(zip(*(one.measured for one in layers), strict=True)):
        contributions = torch.stack([one.by_sequence[place] for one in layers])
        if contributions.isnan().any():
            bare = [
                Interval(value=value, low=None, high=None, n=layers[0].sequences, stderr=None)
                for value in (*values, sum(values) / len(values))
            ]
            found.append(LayerIntervals(layers=tuple(bare[:-1]), mean=bare[-1]))
        else:
            found.append(layered_ratio(contributions, torch.ones_like(contributions), resamples=resamples, seed=seed))
    return tuple(found)


def _pseudo_values(missed: Tensor, measured: list[float], largest: int) -> Float[Tensor, "batches sequences"]:
    count = len(missed)
    values = torch.full((largest, count), torch.nan, dtype=torch.float64)
    known = min(largest, count - 1)
    if known > 0:
        # the means of no sequence: the empty product is 1
        start = torch.zeros(known + 1, missed.shape[1], dtype=torch.float64, device=missed.device)
        start[0] = 1
        without = torch.stack(_without_each(start, 0, missed))[:, 1:]
        values[:known] = count * torch.tensor(measured[:known], dtype=torch.float64)[:, None] - (count - 1) * without.mT
    return values


def _missed(silent: Tensor, tokens: int, taken: int) -> Float[Tensor, "sequences neurons"]:
    """The probability that a neuron is silent at `taken` different tokens of each sequence."""
    found = torch.ones_like(silent)
    for drawn in range(taken):
        found *= (silent - drawn).clamp(min=0) / max(1, tokens - drawn)
    return found


def _subset_means(low: Tensor, high: Tensor) -> Float[Tensor, "sizes neurons"]:
    """For m = 0 .. n the mean over all m of the n rows of the product of `high` there and of `low` elsewhere."""
    count, neurons = high.shape
    means = torch.zeros(count + 1, neurons, dtype=torch.float64, device=high.device)
    means[0] = 1
    for place in range(count):
        means = _one_more(means, place, low[place], high[place])
    return means


def _one_more(means: Tensor, count: int, low: Tensor | float, high: Tensor) -> Tensor:
    """The means over subsets of `count` rows, with one row more: it is in m of count + 1 cases."""
    sizes = torch.arange(len(means), dtype=means.dtype, device=means.device)[:, None]
    inside = sizes / (count + 1)
    grown = (1 - inside).clamp(min=0) * means * low
    grown[1:] += inside[1:] * means[:-1] * high
    return grown


def _without_each(means: Tensor, count: int, rows: Tensor) -> list[Tensor]:
    """1 - the mean over neurons and over subsets of all rows but one, for each row in order: [sizes].

    `means` are those of the `count` rows outside; half of the rows join it to leave the other half open, and so on.
    """
    if len(rows) == 1:
        return [(1 - means.mean(dim=-1)).cpu()]
    halves = rows.tensor_split(2)
    found: list[Tensor] = []
    for half, other in (halves, halves[::-1]):
        joined = means
        for place, row in enumerate(other):
            joined = _one_more(joined, count + place, 1.0, row)
        found += _without_each(joined, count + len(other), half)
    return found
