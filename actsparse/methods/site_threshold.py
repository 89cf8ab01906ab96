"""What CATS and COUNTDOWN have in common: one threshold a layer on the magnitudes at one site of the MLP."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from actsparse.methods.base import (
    Budget,
    Calibration,
    Decides,
    Fit,
    Method,
    drops_by_layer,
    threshold_fit,
    threshold_of,
)
from actsparse.methods.gates import LayerGates, Threshold, TokenGate
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class SiteThreshold(Method, ABC):
    """Neurons with |x_i| >= t_l at `site`, token by token; t_l is the quantile of |x| there on calibration text, pooled
    over tokens and neurons of the layer."""

    site: ClassVar[SiteKind]

    decides = Decides.TOKEN
    serves_experts = True
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        drops = drops_by_layer(budget, self.name, len(calibration.widths))
        thresholds = [calibration.quantile(i, self.site, drop) if drop > 0 else 0.0 for i, drop in enumerate(drops)]
        realised = [calibration.share_below(i, self.site, found) for i, found in enumerate(thresholds)]
        return threshold_fit(thresholds, calibration.widths, predicted=drops, realised=realised)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        rule = Threshold(threshold_of(layer, fit))
        return LayerGates(neurons=TokenGate(self.site, rule, saves=self.saves))
