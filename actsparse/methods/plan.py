"""A fitted plan: a method, what its fit found, and how it is known. To and from records and tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from actsparse.core.cost import LayerDrops, saved
from actsparse.errors import PlanError
from actsparse.methods.add_ons import AddOns
from actsparse.methods.base import Calibration, Fit, Method
from actsparse.methods.error_target import fit_to_error
from actsparse.methods.gates import LayerGates, TokenGate
from actsparse.methods.neuron_allocation import by_layer
from actsparse.methods.registry import method_class
from actsparse.methods.short import NO_ADD_ONS, ShortForm, build
from actsparse.methods.trial import MISFITS, check_entries, try_gates
from actsparse.results import FfnPlace, ModelRecord, Sparsity, StepBytes, TextRecord, ThresholdPlan, Unit


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method fitted to one model. `name` is the short form as typed, or the place that it was read from."""

    name: str
    method: Method
    fit: Fit
    amount: float | None
    target: str
    predicted: Sparsity
    realised: Sparsity | None = None
    add_ons: AddOns = NO_ADD_ONS
    ffns: tuple[FfnPlace, ...] = ()

    @property
    def ideal(self) -> bool:
        """Whether it is a ruler: its masks need what they would save, so it saves nothing, and its bytes are those of
        masks known beforehand."""
        gates = (one.neurons for one in self.layer_gates())
        return self.method.ideal or any(isinstance(gate, TokenGate) and gate.ideal for gate in gates)

    def gates(self) -> list[LayerGates]:
        """The gates of every layer; of a plan over neurons in a model with experts, of every FFN."""
        return gates_of(self.method, self.fit, self.add_ons)

    def layer_gates(self) -> list[LayerGates]:
        """One gate a layer, as the byte model needs them: the experts of a layer are alike."""
        gates = self.gates()
        return gates if len(gates) != len(self.ffns) else first_of_layers(gates, self.ffns)


def gates_of(method: Method, fit: Fit, add_ons: AddOns = NO_ADD_ONS) -> list[LayerGates]:
    """The gates of every layer of a fit, with the add-ons."""
    return [add_ons.applied(method.gates(layer, fit), layer, fit) for layer in range(fit.depth)]


def fit_plan(short: ShortForm, calibration: Calibration, cost: StepBytes, *, gated: bool) -> list[Plan]:
    """The plans of a short form, one a replica; raises PlanError where model or budget do not suit the method."""
    short.method.check(gated)
    short.method.check_experts(calibration.ffns)
    plans = []
    for replica in short.method.replicas():
        fit = with_add_ons(_fit(replica, short, calibration), short.add_ons, calibration)
        gates = gates_of(replica, fit, short.add_ons)
        if len(gates) == len(calibration.ffns):
            gates = first_of_layers(gates, calibration.ffns)
        ffns = calibration.ffns
        plans.append(
            Plan(
                name=short.text,
                method=replica,
                fit=fit,
                amount=short.budget.drop,
                target=_target(short),
                predicted=saved(cost, drops_of(gates, by_unit(fit, fit.predicted_drop, ffns), gated=gated)),
                realised=saved(cost, drops_of(gates, by_unit(fit, fit.realised_drop, ffns), gated=gated))
                if fit.realised_drop
                else None,
                add_ons=short.add_ons,
                ffns=ffns,
            )
        )
    return plans


def with_add_ons(fit: Fit, add_ons: AddOns, calibration: Calibration) -> Fit:
    """A fit with the tensors of the add-ons. What protected neurons add is known beforehand for fixed masks alone: of
    other plans nothing is said to be realised until it is counted."""
    if not add_ons:
        return fit
    found = replace(fit, tensors=fit.tensors | add_ons.tensors(calibration))
    masks = {f"layers.{one.layer}.mask": fit.tensors.get(f"layers.{one.layer}.mask") for one in fit.layers}
    if not add_ons.protect:
        return found
    if any(mask is None for mask in masks.values()):
        return replace(found, realised_drop=())
    kept = [int((fit.tensors[name] | found.tensors[name.replace("mask", "protected")]).sum()) for name in masks]
    layers = tuple(replace(one, kept=count) for one, count in zip(fit.layers, kept, strict=True))
    drops = tuple(1 - one.kept / one.width for one in layers if one.kept is not None)
    return replace(found, layers=layers, predicted_drop=drops, realised_drop=drops)


def to_record(plan: Plan, model: ModelRecord, calibration: TextRecord | None) -> ThresholdPlan:
    """The record of a plan (its tensors are `plan.fit.tensors`)."""
    return ThresholdPlan(
        method=plan.method.name,
        short=plan.name,
        options=plan.method.options | plan.add_ons.options,
        amount=plan.amount,
        target=plan.target,
        model=model,
        calibration=calibration,
        ideal=plan.ideal,
        predicted=plan.predicted,
        realised=plan.realised,
        layers=tuple(
            replace(one, dropped=share) for one, share in zip(plan.fit.layers, plan.fit.predicted_drop, strict=True)
        ),
    )


def check_model(record: ThresholdPlan, name: str, model: ModelRecord) -> None:
    """Raise PlanError where a plan was fitted to another model."""
    if record.model.weights_sha256 != model.weights_sha256:
        raise PlanError(
            f"the plan {name} was fitted to {record.model.resolved}, not to {model.resolved}",
            f"fit one to this model: actsparse threshold RUN --method {record.method}",
        )


def from_record(record: ThresholdPlan, tensors: dict[str, Tensor], name: str) -> Plan:
    """The plan of a record and its tensors; raises PlanError where its options are not the method's."""
    try:
        method, add_ons = build(method_class(record.method), {key: str(value) for key, value in record.options.items()})
    except PlanError as error:
        raise PlanError(
            f"the plan {name} has options that {record.method} lacks: {error.what}", "fit it again"
        ) from None
    fit = Fit(
        layers=tuple(replace(one, dropped=None) for one in record.layers),
        predicted_drop=tuple(one.dropped or 0.0 for one in record.layers),
        tensors=tensors,
    )
    check_entries(fit, name)
    return Plan(
        name=name,
        method=method,
        fit=fit,
        amount=record.amount,
        target=record.target,
        predicted=record.predicted,
        add_ons=add_ons,
        ffns=record.model.ffns,
    )


def check_layers(plan: Plan, layers: int, widths: Mapping[Unit, int]) -> None:
    """Raise PlanError where a plan's layers or tensors do not fit the model; `widths` by unit, the same in every layer.

    A plan over the neurons of experts has an entry for every FFN instead.
    """
    mixed = len(plan.ffns) > layers
    for one in plan.fit.layers:
        if mixed and one.unit is Unit.NEURON and one.width == plan.ffns[one.layer].width:
            continue
        width = widths.get(one.unit, 0)
        if plan.fit.depth != layers or one.width != width:
            raise PlanError(
                f"the plan {plan.name} has {plan.fit.depth} layers of {one.width} ({one.unit}),"
                f" the model has {layers} of {width}",
                "fit the plan to this model",
            )
    try:
        plan.method.check_fit(plan.fit, next(widths[unit] for unit in (Unit.UP, Unit.GATE_UP) if unit in widths))
        gates = plan.gates()
    except MISFITS as error:
        raise PlanError(f"the plan {plan.name} cannot be used: {error!r}", "fit it again") from error
    neurons = [place.width for place in plan.ffns] if len(gates) == len(plan.ffns) else [widths[Unit.NEURON]] * layers
    try_gates(plan.name, gates, widths, neurons)


def by_unit(fit: Fit, drops: Sequence[float], ffns: Sequence[FfnPlace] = ()) -> dict[tuple[Unit, int], float]:
    """Shares dropped by unit and layer, from one entry for each of the fit's; those of a layer's experts weigh as much
    as a token reads of them."""
    found: dict[tuple[Unit, int], float] = {}
    for one, share in zip(fit.layers, drops, strict=True):
        if one.unit is Unit.NEURON and ffns:
            place = ffns[one.layer]
            found[one.unit, place.layer] = found.get((one.unit, place.layer), 0.0) + place.share * share
        else:
            found[one.unit, one.layer] = share
    return found


def first_of_layers(gates: Sequence[LayerGates], ffns: Sequence[FfnPlace]) -> list[LayerGates]:
    """The gates of the first FFN of every layer."""
    return [gate for place, gate in enumerate(gates) if place == 0 or ffns[place].layer != ffns[place - 1].layer]


def drops_of(
    gates: Sequence[LayerGates], dropped: Mapping[tuple[Unit, int], float], *, gated: bool
) -> list[LayerDrops]:
    """What the byte model needs of a plan, one entry a layer: shares dropped, and what is then not read."""
    return [_layer_drops(one, layer, dropped, gated) for layer, one in enumerate(gates)]


def _layer_drops(gates: LayerGates, layer: int, dropped: Mapping[tuple[Unit, int], float], gated: bool) -> LayerDrops:
    neurons = gates.neurons
    drops = LayerDrops(
        neurons=None if neurons is None else dropped.get((Unit.NEURON, layer), 0.0),
        channels={unit: dropped.get((unit, layer), 0.0) for unit in gates.rules},
        heads=None if gates.heads is None else dropped.get((Unit.KV_GROUP, layer), 0.0),
        mlp_extra_bytes=gates.mlp_extra_bytes,
        attention_extra_bytes=gates.attention_extra_bytes,
    )
    if neurons is not None:
        unread = neurons.unread(gated) if isinstance(neurons, TokenGate) else neurons.saves
        drops = replace(drops, neuron_saves=unread)
    return drops if gates.heads is None else replace(drops, head_saves=gates.heads.saves)


def _fit(method: Method, short: ShortForm, calibration: Calibration) -> Fit:
    """What the budget of a short form asks of a method."""
    target = short.budget.target_error
    if target is None or method.takes_error_target:
        split = short.add_ons.allocation == "sensitivity"
        return method.fit(calibration, by_layer(method, calibration, short.budget) if split else short.budget)
    return fit_to_error(method, short.add_ons, calibration, target)[0]


def _target(short: ShortForm) -> str:
    if short.budget.drop is not None:
        return f"drop={short.budget.drop:g}"
    return f"target_error={short.budget.target_error:g}" if short.budget.target_error is not None else "default"
