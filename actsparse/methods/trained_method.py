"""What methods with a trained router share: the options of training, and training layer by layer with checkpoints."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from actsparse.core.router_training import (
    DivergedError,
    Examples,
    Loss,
    RouterWeights,
    Schedule,
    Trained,
    corrected,
    train,
)
from actsparse.errors import PlanError
from actsparse.methods.base import Fit, Method
from actsparse.methods.training import LayerPairs, Training
from actsparse.results import LayerPlan, SiteKind


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(Method, ABC):
    """Options of training: `tokens` bounds the sample of calibration tokens (four in five train, the others judge);
    the rest is the schedule (`core.router_training.Schedule`). `layers` are those that get a router; the others stay
    dense. `weights` is a safetensors file of routers that were trained before, such as a plan's."""

    tokens: int = 8192
    epochs: int = 20
    batch: int = 64
    rate: float = 1e-4
    decay: float = 0.01
    patience: int = 2
    seed: int = 0
    layers: str = "all"
    weights: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"{self.name}: {name} must be at least 1, not {getattr(self, name)}", "correct the value"
                )
        if not 0 < self.rate < float("inf") or not 0 <= self.decay < float("inf"):
            raise PlanError(
                f"{self.name}: rate must be above 0 and decay at least 0, not {self.rate:g} and {self.decay:g}",
                "usual are rate=1e-4 and decay=0.01",
            )
        if not 0 <= self.seed < 2**63:
            raise PlanError(f"{self.name}: seed must be from 0 to 2^63 - 1, not {self.seed}", "correct the value")
        chosen_layers(self.name, self.layers, None)

    @property
    def needs_replay(self) -> bool:
        return True

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.weights).expanduser(),) if self.weights else ()

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            epochs=self.epochs,
            batch=self.batch,
            rate=self.rate,
            decay=self.decay,
            patience=self.patience,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Lesson:
    """What the router of one layer learns from: examples, the loss, and the weights that it starts from."""

    examples: Examples
    loss: Loss
    start: RouterWeights


@dataclass(frozen=True)
class LayerRouter:
    """A router in the dtype that it runs in, with its held-out recall and the epoch that it is from (None: it was
    trained elsewhere)."""

    first: Tensor
    second: Tensor
    recall: float | None = None
    epoch: int | None = None


def chosen_layers(method: str, text: str, count: int | None) -> frozenset[int]:
    """The layers that `all` or a list such as `0-3+7` names; raises PlanError on another text, or on a layer that a
    model of `count` layers lacks (None: not known yet)."""
    if text == "all":
        return frozenset(range(count or 0))
    layers: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise PlanError(f"{method}: layers cannot be '{text}'", "write all, or a list such as 0-3+7")
        layers |= set(range(int(first), int(last if dash else first) + 1))
    if count is not None and max(layers) >= count:
        raise PlanError(
            f"{method}: there is no layer {max(layers)}, the model has layers 0 to {count - 1}", "correct layers"
        )
    return frozenset(layers)


def train_routers(
    method: TrainedMethod,
    training: Training,
    plans: Sequence[LayerPlan],
    site: SiteKind,
    ahead: int,
    lesson: Callable[[LayerPlan, LayerPairs], Lesson],
    target: SiteKind = SiteKind.NEURON,
) -> list[LayerRouter]:
    """The routers of `plans`, one a layer, from inputs at `site` and what the layer did at `target`. A layer that an
    earlier attempt finished is read back; raises PlanError where training leaves the finite numbers."""
    names = {plan.layer: _name(method, plan) for plan in plans}
    found = {layer: kept for layer, name in names.items() if (kept := training.finished(name)) is not None}
    todo = [plan for plan in plans if plan.layer not in found]
    layers = [plan.layer for plan in todo]
    pairs = training.pairs(site, layers, ahead=ahead, tokens=method.tokens, seed=method.seed, target=target)
    for number, (plan, sample) in enumerate(zip(todo, pairs, strict=True), start=1):
        what = f"training the router of layer {plan.layer} ({number} of {len(todo)})"
        with training.task(what, method.schedule.steps(len(sample.x)) * method.epochs, "batches") as advance:
            trained = _train(method, plan, lesson(plan, sample), advance)
        found[plan.layer] = {
            "first": trained.weights.first.to(sample.x.dtype).cpu(),
            "second": trained.weights.second.to(sample.x.dtype).cpu(),
            "facts": torch.tensor([trained.recall, float(trained.epoch)], dtype=torch.float64),
        }
        training.keep(names[plan.layer], found[plan.layer])
    return [_router(found[plan.layer]) for plan in plans]


def read_routers(
    method: TrainedMethod, training: Training, plans: Sequence[LayerPlan], units: Callable[[LayerPlan], int]
) -> list[LayerRouter]:
    """The routers of `plans` from the method's `weights` file, `units` outputs each; raises PlanError naming the layer
    that it lacks, or whose router does not fit the model."""
    path = method.files[0]
    stored = training.read_file(path)
    found = []
    for plan in plans:
        names = [f"layers.{plan.layer}.router.{part}" for part in ("first", "second")]
        if any(name not in stored for name in names):
            raise PlanError(
                f"{path} holds no router for layer {plan.layer} (names such as {names[0]})",
                "give the plan.safetensors of a plan for this model, or leave weights out to train",
            )
        found.append(LayerRouter(stored[names[0]], stored[names[1]]))
        check_router(f"{path}, layer {plan.layer}", found[-1], training.hidden, units(plan))
    return found


def check_router(where: str, router: LayerRouter, hidden: int, units: int) -> None:
    """Raise PlanError where a router's matrices are not [rank, hidden] and [units, rank], or not finite."""
    first, second = tuple(router.first.shape), tuple(router.second.shape)
    fits = len(first) == 2 and len(second) == 2 and first[1] == hidden and second == (units, first[0])
    if not fits:
        raise PlanError(
            f"{where}: a router of {list(first)} and {list(second)} does not fit the model,"
            f" whose layers read {hidden} channels and have {units} units",
            "train one for this model: leave weights out",
        )
    if not bool(router.first.isfinite().all() and router.second.isfinite().all()):
        raise PlanError(f"{where}: the router holds NaN or infinite weights", "train it again")


def router_tensors(layer: int, router: LayerRouter) -> dict[str, Tensor]:
    """The matrices of a layer's router by the names that a plan's file gives them."""
    return {f"layers.{layer}.router.first": router.first, f"layers.{layer}.router.second": router.second}


def router_of(layer: int, fit: Fit) -> LayerRouter:
    """The router of a layer; raises PlanError where the plan's tensors have none."""
    first, second = (tensor_of(fit, f"layers.{layer}.router.{part}") for part in ("first", "second"))
    return LayerRouter(first, second)


def tensor_of(fit: Fit, name: str) -> Tensor:
    """A tensor of a plan by name; raises PlanError where there is none."""
    if name not in fit.tensors:
        raise PlanError(f"the plan's tensors have no '{name}'", "fit the plan again")
    return fit.tensors[name]


def judged_plan(plan: LayerPlan, router: LayerRouter, kept: int, units: int) -> LayerPlan:
    """The plan of a layer with its router's held-out recall of `kept` of `units`, raw and corrected for chance."""
    chance = None if router.recall is None else corrected(router.recall, kept, units)
    return replace(plan, recall=router.recall, recall_corrected=chance, epoch=router.epoch)


def _train(method: TrainedMethod, plan: LayerPlan, lesson: Lesson, advance: Callable[[int], None]) -> Trained:
    try:
        return train(lesson.start, lesson.examples, lesson.loss, method.schedule, advance)
    except DivergedError as error:
        raise PlanError(
            f"{method.name}: training the router of layer {plan.layer} failed: {error}",
            f"lower the rate: --set rate={method.rate / 10:g}; if it stays, look for NaN in a profile of the model",
        ) from None


def _router(kept: dict[str, Tensor]) -> LayerRouter:
    recall, epoch = kept["facts"].tolist()
    return LayerRouter(kept["first"], kept["second"], recall, int(epoch))


def _name(method: TrainedMethod, plan: LayerPlan) -> str:
    """The name of a layer's part among the finished ones: other options or another share train another router."""
    digest = sha256(f"{method!r} {plan.kept} of {plan.width}".encode()).hexdigest()[:12]
    return f"router-{digest}-{plan.layer:03d}"
