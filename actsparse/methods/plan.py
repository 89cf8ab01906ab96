"""A fitted plan: a method, what its fit found, and how it is known. To and from records and tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from actsparse.core.cost import saved
from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit, Gate, Method
from actsparse.methods.registry import method_class
from actsparse.methods.short import ShortForm
from actsparse.results import ModelRecord, Sparsity, StepBytes, TextRecord, ThresholdPlan


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

    def gates(self) -> list[Gate]:
        """The gate of every layer."""
        return [self.method.gate(layer, self.fit) for layer in range(len(self.fit.layers))]


def fit_plan(short: ShortForm, calibration: Calibration, cost: StepBytes, *, gated: bool) -> list[Plan]:
    """The plans of a short form, one a replica; raises PlanError where model or budget do not suit the method."""
    short.method.check(gated)
    plans = []
    matrices = short.method.saved_matrices(gated)
    for replica in short.method.replicas():
        fit = replica.fit(calibration, short.budget)
        plans.append(
            Plan(
                name=short.text,
                method=replica,
                fit=fit,
                amount=short.budget.drop,
                target=_target(short),
                predicted=saved(cost, matrices, list(fit.predicted_drop)),
                realised=saved(cost, matrices, list(fit.realised_drop)) if fit.realised_drop else None,
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
        layers=plan.fit.layers,
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
    drops = tuple(
        1 - one.kept / one.width if one.kept else record.predicted.neuron_frac or 0.0 for one in record.layers
    )
    fit = Fit(layers=record.layers, predicted_drop=drops, tensors=tensors)
    return Plan(
        name=name, method=method, fit=fit, amount=record.amount, target=record.target, predicted=record.predicted
    )


def check_layers(plan: Plan, widths: Sequence[int]) -> None:
    """Raise PlanError where a plan's layers are not the model's."""
    found = [one.width for one in plan.fit.layers]
    if found != list(widths):
        raise PlanError(
            f"the plan {plan.name} has {len(found)} layers of {found[:1]} neurons,"
            f" the model has {len(widths)} of {widths[0]}",
            "fit the plan to this model",
        )


def _target(short: ShortForm) -> str:
    if short.budget.drop is not None:
        return f"drop={short.budget.drop:g}"
    return f"target_error={short.budget.target_error:g}" if short.budget.target_error is not None else "default"
