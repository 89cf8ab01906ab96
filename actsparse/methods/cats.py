"""CATS: contextually-aware thresholding of the gate (arXiv 2404.08763)."""

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
class Cats(Method):
    """Neurons with |act(g_i)| >= t_l, token by token; t_l is the quantile of |act(g)| on calibration text."""

    name = "cats"
    summary = "gate activations over an offline threshold, token by token"
    paper = "arXiv 2404.08763"
    decides = Decides.TOKEN
    serves_experts = True
    needs = (SiteKind.GATE,)
    saves = frozenset({"up", "down"})
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        drops = drops_by_layer(budget, self.name, len(calibration.widths))
        return quantile_fit(calibration, SiteKind.GATE, drops)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        rule = Threshold(threshold_of(layer, fit))
        return LayerGates(neurons=TokenGate(SiteKind.GATE, rule, saves=self.saves))
