"""CHESS: one threshold a neuron, from how large its up projection usually is (arXiv 2409.01366)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.methods.base import (
    Budget,
    Calibration,
    Decides,
    Fit,
    Method,
    drops_by_layer,
    histogram_fit,
    threshold_of,
)
from actsparse.methods.gates import LayerGates, Threshold, TokenGate
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Chess(Method):
    """Neurons with |act(g_i)| >= tau_i = sqrt(theta_l / E[u_i^2]), token by token.

    theta_l is the quantile of act(g_i)^2 * E[u_i^2], pooled over tokens and neurons. It is found as the square of the
    quantile of |act(g_i)| * sqrt(E[u_i^2]), which orders entries alike; `threshold` is sqrt(theta_l).
    """

    name = "chess"
    summary = "gate activations over an offline threshold of each neuron, token by token"
    paper = "arXiv 2409.01366"
    decides = Decides.TOKEN
    serves_experts = True
    needs = (SiteKind.GATE, SiteKind.UP)
    saves = frozenset({"up", "down"})
    gated_only = True
    needs_statistics = True

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        drops = drops_by_layer(budget, self.name, len(calibration.widths))
        usual_up = [calibration.means(i).mean_square_up.sqrt().float() for i in range(len(calibration.widths))]
        scores = calibration.magnitudes(SiteKind.GATE, usual_up)
        return histogram_fit(scores, calibration, drops, {f"layers.{i}.usual_up": up for i, up in enumerate(usual_up)})

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        tau = neuron_thresholds(threshold_of(layer, fit), fit.tensors[f"layers.{layer}.usual_up"])
        return LayerGates(neurons=TokenGate(SiteKind.GATE, Threshold(tau), saves=self.saves))


def neuron_thresholds(root_theta: float, usual_up: Float[Tensor, " neurons"]) -> Float[Tensor, " neurons"]:
    """tau_i = sqrt(theta) / sqrt(E[u_i^2]): infinite where u_i is always 0, and 0 for theta = 0."""
    return root_theta / usual_up if root_theta > 0 else torch.zeros_like(usual_up)
