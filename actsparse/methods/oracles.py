"""Oracles: the exact top r*f of every token, as if known beforehand. Rulers, not methods (methods.md, section 3).

What a perfect predictor of the same score would reach; no speed claim, since the score needs what a mask would save.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import LayerGates, TokenGate, TopK
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Oracle(Method, ABC):
    """The r*f neurons of the largest |x_i| at `site`, token by token."""

    site: ClassVar[SiteKind]
    paper = "control"
    decides = Decides.TOKEN
    serves_experts = True
    has_engine = False
    ideal = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        return counted_fit(counted_layers(budget, self.name, calibration.widths))

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        gate = TokenGate(self.site, TopK(kept_units(layer, fit), self.weights(layer, fit)), ideal=True)
        return LayerGates(neurons=gate)

    def weights(self, layer: int, fit: Fit) -> Tensor | None:
        """What magnitudes are multiplied by before they are ranked."""
        return None


@dataclass(frozen=True, kw_only=True)
class OracleA(Oracle):
    """Top r*f by |a_i|."""

    name = "oracle-a"
    summary = "exact top neurons of each token by |a| (ruler)"
    site = SiteKind.NEURON


@dataclass(frozen=True, kw_only=True)
class OracleN(Oracle):
    """Top r*f by |a_i| * ||w_i||, the norm of what a neuron adds to the output."""

    name = "oracle-n"
    summary = "exact top neurons of each token by |a|*||w|| (ruler)"
    site = SiteKind.NEURON

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = super().fit(calibration, budget).layers
        norms = {f"layers.{one.layer}.norms": calibration.down_norms(one.layer) for one in layers}
        return counted_fit(list(layers), norms)

    def weights(self, layer: int, fit: Fit) -> Tensor | None:
        return fit.tensors[f"layers.{layer}.norms"]


@dataclass(frozen=True, kw_only=True)
class OracleGate(Oracle):
    """Top r*f by |act(g_i)|: the exact-count form of CATS."""

    name = "oracle-gate"
    summary = "exact top neurons of each token by |act(g)| (ruler)"
    needs = (SiteKind.GATE,)
    gated_only = True
    site = SiteKind.GATE


@dataclass(frozen=True, kw_only=True)
class OracleUp(Oracle):
    """Top r*f by |u_i|: the exact-count form of COUNTDOWN."""

    name = "oracle-up"
    summary = "exact top neurons of each token by |u| (ruler)"
    needs = (SiteKind.UP,)
    gated_only = True
    site = SiteKind.UP


def kept_units(layer: int, fit: Fit) -> int:
    """The number of neurons that a fit keeps in a layer."""
    kept = fit.of(layer).kept
    assert kept is not None
    return kept
