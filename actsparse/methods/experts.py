"""Experts made of a layer's neurons: their scores, and the neurons of the best ones (MoE-fication, arXiv 2110.01786).

A score function maps what a router reads to one score an expert; a rule keeps experts in the order of their scores
until enough neurons are kept.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from actsparse.core.router_training import RouterWeights


class ExpertScores(Protocol):
    """Scores of experts from the values of one token, for any number of tokens at once."""

    def __call__(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens experts"]:
        """One score an expert, in float32."""
        ...


@dataclass(frozen=True)
class CentroidScores:
    """The cosine of the layer's input and each expert's centroid [experts, hidden]."""

    centroids: Float[Tensor, "experts hidden"]

    def __call__(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens experts"]:
        return F.normalize(x.float(), dim=-1) @ F.normalize(self.centroids.to(x.device).float(), dim=-1).T


@dataclass(frozen=True)
class TrainedScores:
    """The logits of a trained router of two layers with a tanh between them."""

    first: Float[Tensor, "rank hidden"]
    second: Float[Tensor, "experts rank"]

    def __call__(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens experts"]:
        return RouterWeights(self.first, self.second, tanh=True).logits(x)


@dataclass(frozen=True)
class PositiveSum:
    """The sum of an expert's positive activations (`magnitude`: of all |a|): what a trained router is to predict.

    `expert_of` [neurons]: the expert of every neuron.
    """

    expert_of: Int[Tensor, " neurons"]
    experts: int
    magnitude: bool = False

    def __call__(self, x: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens experts"]:
        values = x.float().abs() if self.magnitude else x.float().clamp(min=0)
        sums = values.new_zeros(*x.shape[:-1], self.experts)
        return sums.index_add_(-1, self.expert_of.to(x.device), values)


@dataclass(frozen=True)
class Experts:
    """Keeps the neurons of the best experts by score, whole experts, until at least `count` neurons are kept; among
    equals the lower expert first. `expert_of` [neurons], `sizes` [experts]: which neurons an expert has, and how many.
    """

    scores: ExpertScores
    expert_of: Int[Tensor, " neurons"]
    sizes: Int[Tensor, " experts"]
    count: int

    def chosen(self, scores: Float[Tensor, "*tokens experts"]) -> Bool[Tensor, "*tokens experts"]:
        """The experts that are kept at each token."""
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        sizes = self.sizes.to(scores.device)[order]
        before = sizes.cumsum(dim=-1) - sizes
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, before < self.count)

    def neurons(self, scores: Float[Tensor, "*tokens experts"]) -> Bool[Tensor, "*tokens neurons"]:
        """The neurons of the experts that these scores choose."""
        return self.chosen(scores)[..., self.expert_of.to(scores.device)]

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens neurons"]:
        """The neurons that are kept at each token."""
        return self.neurons(self.scores(x))


class MeanScores:
    """The mean score of every expert over the prompt tokens added so far; float64 across calls."""

    def __init__(self, scores: ExpertScores) -> None:
        self._scores = scores
        self._total: Tensor | None = None
        self._tokens = 0

    def add(self, rows: Float[Tensor, "tokens width"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        total = self._scores(rows).double().sum(dim=0)
        self._total = total if self._total is None else self._total + total
        self._tokens += len(rows)

    def value(self) -> Float[Tensor, " experts"]:
        """Mean scores [experts], in float64. Raises ValueError before the first token."""
        if self._total is None:
            raise ValueError("the prompt has no token after the sink tokens")
        return self._total / self._tokens
