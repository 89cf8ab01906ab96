"""TDA, threshold-based dynamic activation: *First Activations Matter* (Ma et al., arXiv 2408.11393)."""

from dataclasses import dataclass
from math import floor, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.methods.base import (
    Budget,
    Calibration,
    Decides,
    Fit,
    PromptReplay,
    drops_by_layer,
    threshold_fit,
    threshold_of,
)
from actsparse.methods.gates import LayerGates
from actsparse.methods.length_aware import Margin, fitting_lengths
from actsparse.methods.prompt_method import PromptMethod

DEFAULT_ERROR = 0.2
BISECTION_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Tda(PromptMethod):
    """Neurons with s_j * sqrt(f) >= thr_l, chosen at the end of prefill; thr_l is found offline, layer by layer.

    The threshold meets either a mean relative error of the FFN output on calibration continuations (default 0.2), or
    a sparsity budget pooled over calibration prompts; the second is our definition. With `length_aware` it is found
    for several prompt lengths.
    """

    length_aware: bool = False

    name = "tda"
    summary = "neurons of the prompt over an offline threshold, one mask a sequence"
    paper = "arXiv 2408.11393"
    decides = Decides.PREFILL
    takes_error_target = True

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        replay, widths = calibration.prompts(), calibration.widths
        thresholds, drops = [], []
        for layer in replay.each_layer("fitting thresholds"):
            scores, threshold = self._fit_at(None, replay, layer, budget)
            thresholds.append(threshold)
            drops.append(1 - float(over(scores, threshold).double().mean()))
        return threshold_fit(
            thresholds,
            widths,
            predicted=drops_by_layer(budget, self.name, len(drops)) if budget.names_share else drops,
            realised=drops,
            tensors=self.norm_tensors(calibration) | self._by_length(replay, len(widths), budget),
        )

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        statistic = self.statistic(layer, fit)
        if self.length_aware:
            lengths, thresholds = fit.tensors["lengths"].tolist(), fit.tensors["length_thresholds"][layer].tolist()
            return self.gate(lambda: Margin(statistic(), lengths, thresholds), lambda margin: over(margin, 0.0))
        threshold, root = threshold_of(layer, fit), sqrt(fit.layers[layer].width)
        return self.gate(statistic, lambda value: over(value * root, threshold))

    def _fit_at(
        self, tokens: int | None, replay: PromptReplay, layer: int, budget: Budget
    ) -> tuple[Float[Tensor, "prompts neurons"], float]:
        """Scores and threshold of a layer for prompts of a length (None: the usual one)."""
        scores = replay.statistics(layer, self.reading, tokens)
        scores = scores * sqrt(scores.shape[1])
        if budget.names_share:
            drop = drops_by_layer(budget, self.name, layer + 1)[layer]
            return scores, threshold_for_share(scores, 1 - drop) if drop > 0 else 0.0
        target = DEFAULT_ERROR if budget.target_error is None else budget.target_error
        return scores, _threshold_for_error(replay, layer, scores, target)

    def _by_length(self, replay: PromptReplay, layers: int, budget: Budget) -> dict[str, Tensor]:
        """The prompt lengths and [layers, lengths] their thresholds, by name; an error is measured after the prompt,
        so no length that is fitted to one is longer."""
        if not self.length_aware:
            return {}
        lengths = fitting_lengths(
            replay.prompt_tokens, replay.block_tokens if budget.names_share else replay.prompt_tokens
        )
        found = [[self._fit_at(tokens, replay, layer, budget)[1] for tokens in lengths] for layer in range(layers)]
        return {"lengths": torch.tensor(lengths), "length_thresholds": torch.tensor(found, dtype=torch.float64)}


def over(scores: Float[Tensor, "*prompts neurons"], threshold: float) -> Bool[Tensor, "*prompts neurons"]:
    """Neurons at or over the threshold; the strongest alone where none is."""
    mask = scores >= threshold
    strongest = torch.zeros_like(mask).scatter_(-1, scores.argmax(dim=-1, keepdim=True), True)
    return torch.where(mask.any(dim=-1, keepdim=True), mask, strongest)


def threshold_for_share(scores: Float[Tensor, "prompts neurons"], density: float) -> float:
    """The round(r*N*f)-th largest score, pooled over prompts (methods.md, section 3; ours)."""
    pooled = scores.flatten().sort(descending=True).values
    rank = min(len(pooled), max(1, floor(density * len(pooled) + 0.5)))
    return float(pooled[rank - 1])


def _threshold_for_error(replay: PromptReplay, layer: int, scores: Tensor, target: float) -> float:
    """The largest threshold whose mean error on the continuations is at most `target`, by bisection."""
    low, high = 0.0, float(scores.max())
    if replay.mask_error(layer, over(scores, high)) <= target:
        return high
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        if replay.mask_error(layer, over(scores, middle)) <= target:
            low = middle
        else:
            high = middle
    return low
