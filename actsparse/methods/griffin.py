"""GRIFFIN: the neurons that the prompt used most, for the whole generation (arXiv 2404.01365)."""

from dataclasses import dataclass

from actsparse.core.masks import top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit, counted_layers
from actsparse.methods.gates import LayerGates
from actsparse.methods.prompt_method import PromptMethod


@dataclass(frozen=True, kw_only=True)
class Griffin(PromptMethod):
    """The top r*f neurons by the prompt statistic, chosen at the end of prefill."""

    name = "griffin"
    summary = "top neurons of the prompt, one mask a sequence"
    paper = "arXiv 2404.01365"
    decides = Decides.PREFILL
    serves_experts = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = counted_layers(budget, self.name, calibration.widths)
        return counted_fit(layers, self.norm_tensors(calibration))

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        kept = fit.of(layer).kept
        assert kept is not None
        return self.gate(self.statistic(layer, fit), lambda statistic: top_mask(statistic, kept))
