"""Deja Vu's router, over neurons and over heads: two linear layers without bias or non-linearity, one logit a unit."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actsparse.core.router_training import Examples, RouterWeights, weighted_bce
from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit
from actsparse.methods.gates import Router
from actsparse.methods.trained_method import (
    LayerRouter,
    Lesson,
    TrainedMethod,
    check_router,
    read_routers,
    router_of,
    train_routers,
)
from actsparse.methods.training import LayerPairs
from actsparse.results import LayerPlan, SiteKind


@dataclass(frozen=True, kw_only=True)
class LogitMethod(TrainedMethod, ABC):
    """Keeps the k units of the largest logits; `rank` is the width between the two layers, at most the hidden size."""

    rank: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise PlanError(
                f"{self.name}: rank must be at least 1, not {self.rank}", f"the default is {type(self).rank}"
            )

    @property
    @abstractmethod
    def site(self) -> SiteKind:
        """Where the router reads."""

    @property
    @abstractmethod
    def ahead(self) -> int:
        """How many layers before the one that it decides for."""

    def check_fit(self, fit: Fit, hidden: int) -> None:
        for plan in fit.layers:
            if plan.kept != plan.width:
                check_router(f"{self.name}, layer {plan.layer}", router_of(plan.layer, fit), hidden, plan.width)

    def learned(
        self,
        calibration: Calibration,
        plans: Sequence[LayerPlan],
        examples: Callable[[LayerPlan, LayerPairs], Examples],
        target: SiteKind = SiteKind.NEURON,
    ) -> dict[int, LayerRouter]:
        """The router of each layer of `plans`: from the file that `weights` names, or trained on `examples`, which see
        what the layer did at `target`."""
        if not plans:
            return {}
        training = calibration.training()

        def lesson(plan: LayerPlan, pairs: LayerPairs) -> Lesson:
            hidden = pairs.x.shape[1]
            start = RouterWeights.drawn(hidden, min(self.rank, hidden), plan.width, self.seed + plan.layer)
            return Lesson(examples(plan, pairs), weighted_bce, start)

        if self.weights:
            found = read_routers(self, training, plans, lambda plan: plan.width)
        else:
            found = train_routers(self, training, plans, self.site, self.ahead, lesson, target)
        return {plan.layer: router for plan, router in zip(plans, found, strict=True)}


def rule_of(plan: LayerPlan, fit: Fit) -> Router:
    """The rule of a layer that keeps fewer units than it has."""
    assert plan.kept is not None
    router = router_of(plan.layer, fit)
    return Router(router.first, router.second, plan.kept)


def rule_bytes(rule: Router) -> int:
    """What a router reads for a token."""
    return sum(part.numel() * part.element_size() for part in (rule.first, rule.second))
