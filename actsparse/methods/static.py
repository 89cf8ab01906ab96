"""Static pruning: one mask for all text, the control that every prompt method must beat."""

from dataclasses import dataclass
from typing import Literal

from actsparse.core.masks import kept_count, top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, drop_of
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.results import LayerPlan


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """The top r*f neurons of each layer on calibration text, by mean |a|*||w|| (`mean_n`) or by GRIFFIN's statistic."""

    stat: Literal["mean_n", "griffin"] = "mean_n"

    name = "static"
    summary = "top neurons of the calibration text, one mask for everything (control)"
    paper = "control"
    decides = Decides.OFFLINE
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        density = 1 - drop_of(budget, self.name)
        layers, masks = [], {}
        for layer, width in enumerate(calibration.widths):
            means = calibration.means(layer)
            kept = kept_count(density, width)
            masks[f"layers.{layer}.mask"] = top_mask(means.griffin if self.stat == "griffin" else means.mean_norm, kept)
            layers.append(LayerPlan(layer=layer, width=width, kept=kept))
        return counted_fit(layers, masks)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
