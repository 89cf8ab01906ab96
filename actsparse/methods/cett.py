"""CETT as a method: the neurons whose output is large enough (arXiv 2402.03804; core.cett has the definition)."""

from dataclasses import dataclass

from actsparse.methods.base import (
    Budget,
    Calibration,
    Decides,
    Fit,
    Method,
    drops_by_layer,
    histogram_fit,
    threshold_fit,
    threshold_of,
)
from actsparse.methods.gates import LayerGates, Threshold, TokenGate
from actsparse.results import SiteKind

DEFAULT_TARGET = 0.2


@dataclass(frozen=True, kw_only=True)
class Cett(Method):
    """Neurons with |a_i| * ||w_i|| >= eps_l, token by token.

    eps_l meets a mean CETT on calibration text (default 0.2), or is the quantile of the scores at a share to drop.
    A rule that needs a_i saves the down projection only.
    """

    name = "cett"
    summary = "neurons whose output is over an offline threshold, token by token"
    paper = "arXiv 2402.03804"
    decides = Decides.TOKEN
    saves = frozenset({"down"})
    takes_error_target = True

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        widths = calibration.widths
        norms = [calibration.down_norms(i) for i in range(len(widths))]
        tensors = {f"layers.{i}.norms": one for i, one in enumerate(norms)}
        if budget.names_share:
            drops = drops_by_layer(budget, self.name, len(widths))
            return histogram_fit(calibration.magnitudes(SiteKind.NEURON, norms), calibration, drops, tensors)
        target = DEFAULT_TARGET if budget.target_error is None else budget.target_error
        replay = calibration.prompts()
        points = [replay.cett(i, target) for i in replay.each_layer("solving CETT")]
        drops = [one.sparsity for one in points]
        return threshold_fit([one.eps for one in points], widths, predicted=drops, realised=drops, tensors=tensors)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        rule = Threshold(threshold_of(layer, fit), fit.tensors[f"layers.{layer}.norms"])
        return LayerGates(neurons=TokenGate(SiteKind.NEURON, rule, saves=self.saves))
