"""TDA, threshold-based dynamic activation: *First Activations Matter* (Ma et al., arXiv 2408.11393)."""

from dataclasses import dataclass
from math import floor, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.methods.base import Budget, Calibration, Decides, Fit, Gate, Method, PrefillGate, PromptReplay
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.results import LayerPlan

DEFAULT_ERROR = 0.2
BISECTION_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Tda(Method):
    """Neurons with s_j * sqrt(f) >= thr_l, chosen at the end of prefill; thr_l is found offline, layer by layer.

    The threshold meets either a mean relative error of the FFN output on calibration continuations (default 0.2), or
    a sparsity budget pooled over calibration prompts; the second is our definition.
    """

    name = "tda"
    summary = "neurons of the prompt over an offline threshold, one mask a sequence"
    source = "arXiv 2408.11393"
    decides = Decides.PREFILL
    takes_error_target = True
    needs_replay = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        replay = calibration.prompts()
        layers, drops = [], []
        for layer, width in enumerate(calibration.widths):
            scores = replay.statistics(layer) * sqrt(width)
            if budget.drop is not None:
                threshold = threshold_for_share(scores, 1 - budget.drop)
            else:
                threshold = _threshold_for_error(replay, layer, scores, budget.target_error or DEFAULT_ERROR)
            layers.append(LayerPlan(layer=layer, width=width, threshold=threshold))
            drops.append(1 - float(over(scores, threshold).double().mean()))
        return Fit(
            layers=tuple(layers),
            predicted_drop=tuple(drops) if budget.drop is None else (budget.drop,) * len(drops),
            realised_drop=tuple(drops),
            tensors={"thresholds": torch.tensor([one.threshold for one in layers], dtype=torch.float64)},
        )

    def gate(self, layer: int, fit: Fit) -> Gate:
        threshold, root = fit.layers[layer].threshold, sqrt(fit.layers[layer].width)
        assert threshold is not None
        return PrefillGate(PromptStatistic, lambda statistic: over(statistic * root, threshold))


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
