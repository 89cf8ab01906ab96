"""A fitted plan: a method, what its fit found, and how it is known. To and from records and tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from actsparse.core.cost import LayerDrops, saved
from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit, Method
from actsparse.methods.gates import LayerGates, TokenGate
from actsparse.methods.registry import method_class
from actsparse.methods.short import ShortForm
from actsparse.results import ModelRecord, Sparsity, StepBytes, TextRecord, ThresholdPlan, Unit


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

    def gates(self) -> list[LayerGates]:
        """The gates of every layer."""
        return [self.method.gates(layer, self.fit) for layer in range(self.fit.depth)]


def fit_plan(short: ShortForm, calibration: Calibration, cost: StepBytes, *, gated: bool) -> list[Plan]:
    """The plans of a short form, one a replica; raises PlanError where model or budget do not suit the method."""
    short.method.check(gated)
    plans = []
    for replica in short.method.replicas():
        fit = replica.fit(calibration, short.budget)
        gates = [replica.gates(layer, fit) for layer in range(fit.depth)]
        plans.append(
            Plan(
                name=short.text,
                method=replica,
                fit=fit,
                amount=short.budget.drop,
                target=_target(short),
                predicted=saved(cost, drops_of(gates, by_unit(fit, fit.predicted_drop), gated=gated)),
                realised=saved(cost, drops_of(gates, by_unit(fit, fit.realised_drop), gated=gated))
                if fit.realised_drop
                else None,
            )
        )
    return plans


def to_record(plan: Plan, model: ModelRecord, calibration: TextRecord | None) -> ThresholdPlan:
    """The record of a plan (its tensors are `plan.fit.tensors`)."""
    return ThresholdPlan(
        method=plan.method.name,
        short=plan.name,
        options=plan.method.options,
        amount=plan.amount,
        target=plan.target,
        model=model,
        calibration=calibration,
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
    cls = method_class(record.method)
    try:
        method = cls(**record.options)
    except TypeError as error:
        raise PlanError(f"the plan {name} has options that {record.method} lacks: {error}", "fit it again") from None
    fit = Fit(
        layers=tuple(replace(one, dropped=None) for one in record.layers),
        predicted_drop=tuple(one.dropped or 0.0 for one in record.layers),
        tensors=tensors,
    )
    return Plan(
        name=name, method=method, fit=fit, amount=record.amount, target=record.target, predicted=record.predicted
    )


def check_layers(plan: Plan, layers: int, widths: Mapping[Unit, int]) -> None:
    """Raise PlanError where a plan's layers are not the model's; `widths` by unit, the same in every layer."""
    for one in plan.fit.layers:
        width = widths.get(one.unit, 0)
        if plan.fit.depth != layers or one.width != width:
            raise PlanError(
                f"the plan {plan.name} has {plan.fit.depth} layers of {one.width} ({one.unit}),"
                f" the model has {layers} of {width}",
                "fit the plan to this model",
            )


def by_unit(fit: Fit, drops: Sequence[float]) -> dict[tuple[Unit, int], float]:
    """Shares dropped by unit and layer, from one entry for each of the fit's."""
    return {(one.unit, one.layer): share for one, share in zip(fit.layers, drops, strict=True)}


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


def _target(short: ShortForm) -> str:
    if short.budget.drop is not None:
        return f"drop={short.budget.drop:g}"
    return f"target_error={short.budget.target_error:g}" if short.budget.target_error is not None else "default"
