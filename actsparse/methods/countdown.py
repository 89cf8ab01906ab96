"""COUNTDOWN (M variant): thresholding of the up projection, known before the gate is read (arXiv 2505.17701)."""

from dataclasses import dataclass

from actsparse.methods.base import (
    Budget,
    Calibration,
    Decides,
    Fit,
    Method,
    drops_by_layer,
    quantile_fit,
    threshold_of,
)
from actsparse.methods.gates import LayerGates, Threshold, TokenGate
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Countdown(Method):
    """Neurons with |u_i| >= t_l, token by token; t_l is the quantile of |u| on calibration text."""

    name = "countdown"
    summary = "up activations over an offline threshold, token by token"
    paper = "arXiv 2505.17701"
    decides = Decides.TOKEN
    serves_experts = True
    needs = (SiteKind.UP,)
    saves = frozenset({"gate", "down"})
    gated_only = True
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        drops = drops_by_layer(budget, self.name, len(calibration.widths))
        return quantile_fit(calibration, SiteKind.UP, drops)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        rule = Threshold(threshold_of(layer, fit))
        return LayerGates(neurons=TokenGate(SiteKind.UP, rule, saves=self.saves))
