"""GRIFFIN: the neurons that the prompt used most, for the whole generation (arXiv 2404.01365)."""

from dataclasses import dataclass

from actsparse.core.masks import kept_count, top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit, drop_of
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.methods.prompt_method import PromptMethod
from actsparse.results import LayerPlan


@dataclass(frozen=True, kw_only=True)
class Griffin(PromptMethod):
    """The top r*f neurons by the prompt statistic, chosen at the end of prefill."""

    name = "griffin"
    summary = "top neurons of the prompt, one mask a sequence"
    paper = "arXiv 2404.01365"
    decides = Decides.PREFILL

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        density = 1 - drop_of(budget, self.name)
        layers = [LayerPlan(layer=i, width=w, kept=kept_count(density, w)) for i, w in enumerate(calibration.widths)]
        return counted_fit(layers, self.norm_tensors(calibration))

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        kept = fit.layers[layer].kept
        assert kept is not None
        gate = PrefillGate(self.statistic(layer, fit), lambda statistic: top_mask(statistic, kept))
        return LayerGates(neurons=gate)
