"""GRIFFIN: the neurons that the prompt used most, for the whole generation (arXiv 2404.01365)."""

from dataclasses import dataclass

from actsparse.core.masks import kept_count, top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Gate, Method, PrefillGate, counted_fit, drop_of
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.results import LayerPlan


@dataclass(frozen=True, kw_only=True)
class Griffin(Method):
    """The top r*f neurons by the prompt statistic, chosen at the end of prefill."""

    name = "griffin"
    summary = "top neurons of the prompt, one mask a sequence"
    source = "arXiv 2404.01365"
    decides = Decides.PREFILL

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        density = 1 - drop_of(budget, self.name)
        widths = enumerate(calibration.widths)
        return counted_fit([LayerPlan(layer=i, width=width, kept=kept_count(density, width)) for i, width in widths])

    def gate(self, layer: int, fit: Fit) -> Gate:
        kept = fit.layers[layer].kept
        assert kept is not None
        return PrefillGate(PromptStatistic, lambda statistic: top_mask(statistic, kept))
