"""Oracles: the exact top r*f of every token, as if known beforehand. Rulers, not methods (methods.md, section 3).

What a perfect predictor of the same score would reach; no speed claim, since the score needs what a mask would save.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.masks import kept_count
from actsparse.core.overlap import topk_masks
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Gate, Method, TokenGate, counted_fit, drop_of
from actsparse.results import LayerPlan, SiteKind


@dataclass(frozen=True, kw_only=True)
class Oracle(Method, ABC):
    """The r*f neurons of the largest |x_i| at `site`, token by token."""

    site: ClassVar[SiteKind]
    paper = "control"
    decides = Decides.TOKEN
    has_engine = False
    ideal = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        density = 1 - drop_of(budget, self.name)
        layers = [LayerPlan(layer=i, width=w, kept=kept_count(density, w)) for i, w in enumerate(calibration.widths)]
        return counted_fit(layers)

    def gate(self, layer: int, fit: Fit) -> Gate:
        density = kept_share(layer, fit)
        return TokenGate(self.site, lambda x: topk_masks(x.abs(), density))


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

    def gate(self, layer: int, fit: Fit) -> Gate:
        density, norms = kept_share(layer, fit), fit.tensors[f"layers.{layer}.norms"]

        def keep(a: Float[Tensor, "*tokens neurons"]) -> Bool[Tensor, "*tokens neurons"]:
            return topk_masks(a.abs().float() * norms.to(a.device), density)

        return TokenGate(self.site, keep)


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


def kept_share(layer: int, fit: Fit) -> float:
    """The density that keeps exactly the fitted number of neurons."""
    plan = fit.layers[layer]
    assert plan.kept is not None
    return plan.kept / plan.width
