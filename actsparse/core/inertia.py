"""Semantic-irrelevant activation inertia: masks that stay alike within a text, whatever it says (methods.md section 6).

    SI2   does that need meaning?  `si2`, `semantics_ratio`
    2x2   masks of whole sentences, real or random, alone or in one stream  `sentence_masks`, `sentence_matrices`

What SI2 averages stands in `core.inertia_pairs`, SI1 in `core.prefixes`. Our definitions [I], after MOYU (arXiv
2406.12569) and CLADA (arXiv 2502.19078). Positions count after the sink tokens (the first four), which have been
dropped from every argument.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.bootstrap import (
    RESAMPLES,
    Interval,
    LayerIntervals,
    interval,
    layer_intervals,
    resample_weights,
    weighted_pair_means,
    weighted_pair_ratio,
)
from actsparse.core.inertia_pairs import InertiaPairs
from actsparse.core.overlap import Rates, Widths, of_layers, pairwise_overlaps, widths_of
from actsparse.core.prefixes import layer_prefix_masks


def spread_blocks(blocks: int, sequences: int = 8) -> list[int]:
    """The blocks 0, m, .. 7m with m = floor(blocks / 8), since neighbours share a topic; all of fewer than 8."""
    step = max(1, blocks // sequences)
    return list(range(0, blocks, step))[:sequences]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inertia:
    """SI2 of one rung: `within` W, `between` B at equal positions, `between_apart` B apart, `excess` J = W - B.

    Each a mean kappa (or raw overlap, at rate 0), at most 1. J > 0: a text's masks hold together more than unrelated
    texts' do. None where no pair of tokens differs (`repeat`).
    """

    within: LayerIntervals
    between: LayerIntervals
    between_apart: LayerIntervals
    excess: LayerIntervals


def si2(layers: Sequence[InertiaPairs], *, resamples: int = RESAMPLES, seed: int = 0) -> Inertia:
    """W, B and J = W - B of every layer: means over pairs of tokens; sequences are resampled."""
    sequences = layers[0].within_sum.numel()
    values = _inertia_means(layers, torch.ones(1, sequences, dtype=torch.float64))
    samples = _inertia_means(layers, resample_weights(sequences, resamples=resamples, seed=seed))
    within, between, apart, excess = (
        layer_intervals(value[0], sample, sequences) for value, sample in zip(values, samples, strict=True)
    )
    return Inertia(within=within, between=between, between_apart=apart, excess=excess)


def _inertia_means(layers: Sequence[InertiaPairs], weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, B, B apart and J under the weights, each [resamples, layers]."""
    within_sum = torch.stack([pairs.within_sum for pairs in layers])
    within_count = torch.stack([pairs.within_count for pairs in layers])
    within = (weights @ within_sum.mT) / (weights @ within_count.mT)
    between, apart = (
        weighted_pair_ratio(torch.stack(sums), torch.stack(counts), weights)
        for sums, counts in (
            ([pairs.equal_sum for pairs in layers], [pairs.equal_count for pairs in layers]),
            ([pairs.apart_sum for pairs in layers], [pairs.apart_count for pairs in layers]),
        )
    )
    return within, between, apart, within - between


def semantics_ratio(
    meaningless: Sequence[InertiaPairs], natural: Sequence[InertiaPairs], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """SIR = J(meaningless) / J(natural), a ratio of layer means; `meaningless` is the rung uniform-random.

    About 1 or more: inertia needs no meaning; about 0: it is semantic. The value is None where the interval of
    J(natural) touches 0. Both rungs come from the same sequences and are resampled together. The chance rate cancels
    when both use the same one.
    """
    sequences = natural[0].within_sum.numel()
    ones = torch.ones(1, sequences, dtype=torch.float64)
    weights = resample_weights(sequences, resamples=resamples, seed=seed)
    values, samples = (
        [_inertia_means(rung, rows)[3].nanmean(dim=1) for rung in (meaningless, natural)] for rows in (ones, weights)
    )
    denominator = interval(float(values[1]), samples[1], sequences)
    if denominator.touches(0.0):
        return Interval(value=None, low=None, high=None, n=sequences, stderr=None)
    return interval(float(values[0] / values[1]), samples[0] / samples[1], sequences)


def sentence_masks(
    sentences: Sequence[Float[Tensor, "_ units"]],
    masks: Sequence[Bool[Tensor, "_ units"]],
    density: float | None,
    widths: Widths | None = None,
) -> Bool[Tensor, "sentences units"]:
    """One mask per sentence, that of a prefix which is all of it: see `layer_prefix_masks`.

    `sentences` are its activations in one layer, `masks` its tokens' masks, without the first four tokens of every
    sentence, in both arms of the 2x2 (each sentence fed alone, or all in one stream).
    """
    pairs = zip(sentences, masks, strict=True)
    return torch.cat([layer_prefix_masks(rows, own, [len(rows)], density, widths) for rows, own in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceMatrices:
    """One arm of the 2x2: K x K matrices of kappa between sentences, in early, middle and late layers.

    Entry (i, j) is the mean over the layers of the band. `similarity` is the mean off the diagonal per layer;
    `bands` the same for early, middle and late. At most 1; 0 is chance. High everywhere for random words in sequence
    but not in parallel: inertia. Sentences are resampled.
    """

    early: Float[Tensor, "sentences sentences"]
    middle: Float[Tensor, "sentences sentences"]
    late: Float[Tensor, "sentences sentences"]
    bands: tuple[Interval, Interval, Interval]
    similarity: LayerIntervals


def sentence_matrices(
    masks: Bool[Tensor, "layers sentences neurons"],
    rates: Rates,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> SentenceMatrices:
    """The matrices of one arm of the 2x2 from its per-sentence masks."""
    layers = zip(masks, of_layers(rates, len(masks)), strict=True)
    kappas = torch.stack([pairwise_overlaps(rows, rows, widths_of(rate)).kappa(rate) for rows, rate in layers])
    kappas = kappas.double().cpu()
    sentences = kappas.shape[-1]
    bands = torch.stack([kappas[first:last].nanmean(dim=0) for first, last in layer_bands(len(kappas))])
    weights = resample_weights(sentences, resamples=resamples, seed=seed)
    ones = torch.ones(1, sentences, dtype=torch.float64)

    def off_diagonal(matrices: Tensor) -> LayerIntervals:
        values = weighted_pair_means(matrices, ones)[0]
        return layer_intervals(values, weighted_pair_means(matrices, weights), sentences)

    early, middle, late = off_diagonal(bands).layers
    return SentenceMatrices(
        early=bands[0],
        middle=bands[1],
        late=bands[2],
        bands=(early, middle, late),
        similarity=off_diagonal(kappas),
    )


def layer_bands(layers: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Half-open ranges of the early, middle and late third of the layers; of fewer than 3, bands share layers."""
    starts = [third * layers // 3 for third in range(4)]
    early, middle, late = ((low, max(low + 1, high)) for low, high in pairwise(starts))
    return early, middle, late
