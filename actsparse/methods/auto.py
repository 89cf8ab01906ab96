"""`auto` (ours): for a budget of bytes, the best mix of the other methods' rules, by layer and projection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from actsparse.core.choose import Option, cheapest, pareto
from actsparse.core.cost import LayerDrops, parts_of
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method
from actsparse.methods.candidates import Candidate, Measured, measure
from actsparse.methods.channels import ALL_PROJECTIONS, OF_MLP
from actsparse.methods.gates import ChannelGate, LayerGates
from actsparse.results import LayerPlan, SiteKind, StepBytes, Unit

FRONTIER = tuple(step / 20 for step in range(1, 13))


@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """The mix of rules that saves a share of the model's weight bytes at the least measured error.

    Every candidate (a method's rule for one projection, or for the neurons of one layer, at one share dropped) is
    measured alone: the squared error of its layer's output, times how much the layer's error moves the model's
    prediction. Candidates are taken as independent; the cheapest set for the bytes asked for is chosen.
    `methods`: whose rules are tried. `max_kl` in nats per token (0: none): a mix that moves the predictions on
    calibration text by more is not accepted, and the largest budget that keeps the limit is taken.
    """

    methods: str = "teal+wina+cats"
    max_kl: float = 0.0

    name = "auto"
    summary = "the best mix of other methods' rules for a share of the model's bytes, by layer and projection"
    paper = "ours"
    decides = Decides.TOKEN
    needs = (SiteKind.ATTN_IN, SiteKind.ATTN_OUT, SiteKind.MLP_IN, SiteKind.GATE, SiteKind.NEURON)
    saves = ALL_PROJECTIONS
    needs_statistics = True

    def __post_init__(self) -> None:
        if not 0 <= self.max_kl < float("inf"):
            raise PlanError(f"auto: max_kl must be at least 0, not {self.max_kl:g}", "0 sets no limit")
        if not self._names:
            raise PlanError("auto: methods names none", "write methods=teal+wina+cats")

    @property
    def _names(self) -> list[str]:
        return [name for name in self.methods.split("+") if name]

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        if budget.drop is None:
            raise PlanError(
                "auto needs one share of the model's bytes to save", "write auto@0.25, or give --sparsity 0.25"
            )
        measured = measure(self._names, calibration)
        step = calibration.channels().step
        parts = [part for layer in range(step.layers) for part in layer_parts(layer, measured, step)]
        frontier = [cheapest(parts, share * step.total) for share in FRONTIER]
        chosen = self._within_limit(parts, budget.drop, step, measured, calibration)
        return _fit_of(chosen, measured, _table(frontier, step))

    def _within_limit(
        self,
        parts: Sequence[Sequence[Option[tuple[Candidate, ...]]]],
        share: float,
        step: StepBytes,
        measured: Measured,
        calibration: Calibration,
    ) -> list[Option[tuple[Candidate, ...]]]:
        chosen = cheapest(parts, share * step.total)
        reached = sum(one.saved for one in chosen) / step.total
        if reached < share - 1e-9:
            raise PlanError(
                f"auto cannot save {share:.1%} of the model's bytes with the rules of {', '.join(self._names)}",
                f"the nearest reachable share is auto@{reached:.3f}",
            )
        if not self.max_kl:
            return chosen
        low, high = 0.0, share
        for _ in range(6):
            if calibration.channels().kl(_gates_of(chosen, measured, step.layers)) <= self.max_kl:
                low = share
            else:
                high = share
            if low == high:
                return chosen
            share = (low + high) / 2
            chosen = cheapest(parts, share * step.total)
        return cheapest(parts, low * step.total)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        found = LayerGates()
        entries = [one for one in fit.layers if one.layer == layer and one.rule is not None]
        for rule in sorted({one.rule for one in entries if one.rule is not None}):
            # what a method's own gates need: its entries of this layer, and its tensors by their own names
            own = tuple(replace(one, rule=None) for one in entries if one.rule == rule)
            prefix = f"{rule}/"
            tensors = {name.removeprefix(prefix): one for name, one in fit.tensors.items() if name.startswith(prefix)}
            part = Fit(layers=own, predicted_drop=(0.0,) * len(own), tensors=tensors)
            found = joined(found, Candidate.method_of(rule).gates(layer, part))
        return found


def joined(one: LayerGates, other: LayerGates) -> LayerGates:
    """Two sets of gates over different units as one."""
    rules = {**one.rules, **other.rules}
    return LayerGates(
        neurons=one.neurons or other.neurons,
        channels=ChannelGate(rules) if rules else None,
        mlp_extra_bytes=one.mlp_extra_bytes + other.mlp_extra_bytes,
        attention_extra_bytes=one.attention_extra_bytes + other.attention_extra_bytes,
    )


def layer_parts(layer: int, measured: Measured, step: StepBytes) -> list[list[Option[tuple[Candidate, ...]]]]:
    """What each part of a layer may do: every attention projection alone, and the MLP as a whole.

    In the MLP a rule over neurons may stand beside channel rules of `gate` and `up`, whose columns it then shortens.
    """
    by_unit = measured.by_unit(layer)
    weight = measured.weights[layer]
    attention = [unit for unit in by_unit if unit.is_projection and unit not in OF_MLP]
    parts = [pareto([_option((one,), weight, step) for one in by_unit[unit]]) for unit in attention]
    channels = [by_unit[unit] for unit in by_unit if unit in OF_MLP]
    options = [_option(mix, weight, step) for mix in product(*channels)]
    before_down = [by_unit[unit] for unit in by_unit if unit in OF_MLP and unit is not Unit.DOWN]
    for neurons in by_unit.get(Unit.NEURON, ()):
        options += [_option((neurons, *mix), weight, step) for mix in product(*before_down)]
    return [*parts, pareto(options)]


def _option(mix: tuple[Candidate, ...], weight: float, step: StepBytes) -> Option[tuple[Candidate, ...]]:
    acting = tuple(one for one in mix if one.dropped > 0)
    drops = drops_of_mix(acting)
    sizes = step.mlp | step.projections
    touched = {name for one in mix for name in (parts_of(one.unit) if one.unit.is_projection else step.mlp)}
    saved = sum(sizes[name] * drops.unread(name) for name in touched) - sum(one.extra_bytes for one in acting)
    return Option(saved, weight * sum(one.error**2 for one in acting), acting)


def drops_of_mix(mix: Sequence[Candidate]) -> LayerDrops:
    """What a mix drops, for the byte model."""
    neurons = next((one for one in mix if one.unit is Unit.NEURON), None)
    channels = {one.unit: one.dropped for one in mix if one.unit.is_projection}
    if neurons is None:
        return LayerDrops(channels=channels)
    return LayerDrops(neurons=neurons.dropped, neuron_saves=neurons.saves, channels=channels)


def _fit_of(chosen: Sequence[Option[tuple[Candidate, ...]]], measured: Measured, frontier: Tensor) -> Fit:
    picks = [pick for option in chosen for pick in option.choice]
    order = {unit: place for place, unit in enumerate(Unit)}
    picks.sort(key=lambda one: (one.layer, order[one.unit]))
    tensors = {"frontier": frontier}
    for pick in picks:
        tensors |= measured.tensors(pick)
    # a layer in which nothing is dropped is part of the plan too
    silent = [i for i in range(len(measured.weights)) if all(pick.layer != i for pick in picks)]
    empty = [LayerPlan(layer=i, unit=Unit.NEURON, width=measured.neurons, dropped=0.0) for i in silent]
    entries = sorted([*(pick.entry for pick in picks), *empty], key=lambda one: (one.layer, order[one.unit]))
    drops = {(pick.layer, pick.unit): pick.dropped for pick in picks}
    shares = tuple(drops.get((one.layer, one.unit), 0.0) for one in entries)
    return Fit(layers=tuple(entries), predicted_drop=shares, realised_drop=shares, tensors=tensors)


def _gates_of(chosen: Sequence[Option[tuple[Candidate, ...]]], measured: Measured, layers: int) -> list[LayerGates]:
    fit = _fit_of(chosen, measured, torch.empty(0))
    return [Auto().gates(layer, fit) for layer in range(layers)]


def _table(frontier: Sequence[Sequence[Option[tuple[Candidate, ...]]]], step: StepBytes) -> Tensor:
    """[budgets, 2]: share of the model's bytes saved, and the predicted cost, in nats."""
    rows = [[sum(one.saved for one in mix) / step.total, sum(one.cost for one in mix)] for mix in frontier]
    return torch.tensor(rows, dtype=torch.float64)
