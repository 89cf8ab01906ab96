"""CATS: contextually-aware thresholding of the gate (arXiv 2404.08763)."""

from dataclasses import dataclass

import torch

from actsparse.methods.base import Budget, Calibration, Decides, Fit, Gate, Method, TokenGate, drop_of
from actsparse.results import LayerPlan, SiteKind


@dataclass(frozen=True, kw_only=True)
class Cats(Method):
    """Neurons with |act(g_i)| >= t_l, token by token; t_l is the quantile of |act(g)| on calibration text."""

    name = "cats"
    summary = "gate activations over an offline threshold, token by token"
    source = "arXiv 2404.08763"
    decides = Decides.TOKEN
    needs = (SiteKind.GATE,)
    saves = frozenset({"up", "down"})
    has_engine = False
    needs_statistics = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        drop = drop_of(budget, self.name)
        layers = tuple(
            LayerPlan(layer=i, width=width, threshold=calibration.quantile(i, SiteKind.GATE, drop) if drop > 0 else 0.0)
            for i, width in enumerate(calibration.widths)
        )
        return Fit(
            layers=layers,
            predicted_drop=tuple(drop for _ in layers),
            realised_drop=tuple(
                calibration.share_below(one.layer, SiteKind.GATE, one.threshold or 0) for one in layers
            ),
            tensors={"thresholds": torch.tensor([one.threshold for one in layers], dtype=torch.float64)},
        )

    def gate(self, layer: int, fit: Fit) -> Gate:
        threshold = fit.layers[layer].threshold
        assert threshold is not None
        return TokenGate(SiteKind.GATE, lambda gate: gate.abs() >= threshold)
