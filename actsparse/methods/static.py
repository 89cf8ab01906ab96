"""Static pruning: one mask for all text, the control that every prompt method must beat."""

from dataclasses import dataclass
from typing import Literal

from actsparse.core.masks import top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import FixedGate, LayerGates


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """The top r*f neurons of each layer on calibration text, by mean |a|*||w|| (`mean_n`) or by GRIFFIN's statistic."""

    stat: Literal["mean_n", "griffin"] = "mean_n"

    name = "static"
    summary = "top neurons of the calibration text, one mask for everything (control)"
    paper = "control"
    decides = Decides.OFFLINE
    serves_experts = True
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = counted_layers(budget, self.name, calibration.widths)
        masks = {}
        for one in layers:
            means = calibration.means(one.layer)
            scores = means.griffin if self.stat == "griffin" else means.mean_norm
            masks[f"layers.{one.layer}.mask"] = top_mask(scores, one.kept or one.width)
        return counted_fit(layers, masks)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
