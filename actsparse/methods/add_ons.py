"""Add-ons that work with every method that drops neurons (ours): compensation of what is dropped, protected neurons.

`compensate`: a dropped neuron counts as its mean activation on calibration text, in place of 0. Under a fixed mask
that is a constant bias, W_d E[a * (1 - m)]. `protect` q: the top q share of neurons by mean |a|*||w|| on calibration
text are always kept, beside those that the method keeps. `allocation` sensitivity: layers drop different shares, so
that the sum of their squared errors is least (`methods.neuron_allocation`).
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.masks import kept_count, top_mask
from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit
from actsparse.methods.gates import FixedGate, LayerGates, NeuronGate, PrefillGate, Protected


@dataclass(frozen=True, kw_only=True)
class AddOns:
    """Which add-ons a plan has; the defaults are none."""

    compensate: bool = False
    protect: float = 0.0
    allocation: Literal["uniform", "sensitivity"] = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.protect < 1:
            raise PlanError(f"protect must be at least 0 and below 1, not {self.protect:g}", "write protect=0.1")

    def __bool__(self) -> bool:
        return self != AddOns()

    @property
    def options(self) -> dict[str, bool | float | str]:
        """Those that differ from their defaults, by name."""
        return {
            part.name: getattr(self, part.name) for part in fields(self) if getattr(self, part.name) != part.default
        }

    def tensors(self, calibration: Calibration) -> dict[str, Tensor]:
        """What the gates need, by name: means of the neurons, masks of the protected ones."""
        found: dict[str, Tensor] = {}
        for layer, width in enumerate(calibration.widths if self else ()):
            means = calibration.means(layer)
            if self.compensate:
                found[f"layers.{layer}.fill"] = means.mean.float()
            if self.protect:
                found[f"layers.{layer}.protected"] = top_mask(means.mean_norm, kept_count(self.protect, width))
        return found

    def applied(self, gates: LayerGates, layer: int, fit: Fit) -> LayerGates:
        """The gates of a layer with the add-ons; raises PlanError where the method drops no neurons there."""
        if not self:
            return gates
        if gates.neurons is None:
            raise PlanError(
                "compensate, protect and this allocation are about neurons, and this method drops none",
                "use them with a method such as griffin, static, tda or cats",
            )
        neurons = gates.neurons
        if self.protect:
            neurons = protected(neurons, fit.tensors[f"layers.{layer}.protected"])
        if self.compensate:
            neurons = replace(neurons, fill=fit.tensors[f"layers.{layer}.fill"])
        return replace(gates, neurons=neurons)


def protected(gate: NeuronGate, always: Bool[Tensor, " neurons"]) -> NeuronGate:
    """A gate that keeps `always` beside what it keeps."""
    if isinstance(gate, FixedGate):
        return replace(gate, mask=gate.mask | always.to(gate.mask.device))
    if isinstance(gate, PrefillGate):
        rule = gate.rule

        def keep(statistic: Float[Tensor, " width"]) -> Bool[Tensor, " neurons"]:
            mask = rule(statistic)
            return mask | always.to(mask.device)

        return replace(gate, rule=keep)
    return replace(gate, rule=Protected(gate.rule, always))
