"""Trained routers over heads: which KV groups a token will use, guessed before attention runs (arXiv 2310.17157).

Deja Vu's router with KV groups as units: two linear layers without bias or non-linearity, hidden -> rank -> groups.
Labels are the oracle's: a token's k groups of the largest output norm. `input` says what it reads: the attention's own
normed input (`sequential`), or that of the layer before (`lookahead`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from actsparse.core.router_training import Examples, RouterWeights, weighted_bce
from actsparse.core.streaming import HeadGrams
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit
from actsparse.methods.gates import HeadGate, LayerGates, Router
from actsparse.methods.heads_oracle import LargestGroups, Policy, check_dense_layers, group_plans
from actsparse.methods.trained_method import (
    LayerRouter,
    Lesson,
    TrainedMethod,
    check_router,
    chosen_layers,
    judged_plan,
    read_routers,
    router_of,
    router_tensors,
    train_routers,
)
from actsparse.methods.training import LayerPairs
from actsparse.results import KvPolicy, LayerPlan, SiteKind, Unit


@dataclass(frozen=True, kw_only=True)
class HeadsRouter(TrainedMethod):
    """The k KV groups that a trained router expects to be used. `policy`: what becomes of a dropped group's keys and
    values; `dense_layers`: the first layers, which keep every head."""

    input: Literal["sequential", "lookahead"] = "sequential"
    rank: int = 128
    policy: Policy = "compute_all"
    dense_layers: int = 1

    name = "heads-router"
    summary = "KV groups that a trained router expects the token to use"
    paper = "arXiv 2310.17157, 2505.14884"
    decides = Decides.TOKEN
    serves_experts = True
    needs = (SiteKind.ATTN_IN,)
    saves = frozenset({"q", "o"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dense_layers(self.dense_layers, self.name)
        if self.rank < 1:
            raise PlanError(f"{self.name}: rank must be at least 1, not {self.rank}", "the default is 128")

    @property
    def ahead(self) -> int:
        """How many layers before the one that it decides for."""
        return 1 if self.input == "lookahead" else 0

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        plans = group_plans(calibration, budget, self.dense_layers, self.name)
        routed = chosen_layers(self.name, self.layers, len(plans))
        wanted = [plan for plan in plans if plan.kept != plan.width and plan.layer in routed]
        routers = dict(zip([plan.layer for plan in wanted], self._routers(calibration, wanted), strict=True))
        tensors: dict[str, Tensor] = {}
        for plan in wanted:
            tensors |= router_tensors(plan.layer, routers[plan.layer])
        return counted_fit([self._judged(plan, routers) for plan in plans], tensors)

    def _judged(self, plan: LayerPlan, routers: dict[int, LayerRouter]) -> LayerPlan:
        if plan.layer not in routers:
            return LayerPlan(layer=plan.layer, unit=Unit.KV_GROUP, width=plan.width, kept=plan.width)
        return judged_plan(plan, routers[plan.layer], plan.kept or 0, plan.width)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.of(layer, Unit.KV_GROUP)
        if plan.kept is None or plan.kept == plan.width:
            return LayerGates()
        router = router_of(layer, fit)
        rule = Router(router.first, router.second, plan.kept)
        return LayerGates(
            heads=HeadGate(SiteKind.ATTN_IN, rule, ahead=self.ahead, policy=KvPolicy(self.policy)),
            attention_extra_bytes=sum(part.numel() * part.element_size() for part in (router.first, router.second)),
        )

    def check_fit(self, fit: Fit, hidden: int) -> None:
        for plan in fit.layers:
            if plan.kept != plan.width:
                check_router(f"{self.name}, layer {plan.layer}", router_of(plan.layer, fit), hidden, plan.width)

    def _routers(self, calibration: Calibration, plans: Sequence[LayerPlan]) -> list[LayerRouter]:
        if not plans:
            return []
        training, shape = calibration.training(), calibration.attention
        if self.weights:
            return read_routers(self, training, plans, lambda plan: plan.width)

        def lesson(plan: LayerPlan, pairs: LayerPairs) -> Lesson:
            assert plan.kept is not None
            matrix = calibration.output_matrix(plan.layer)
            oracle = LargestGroups(HeadGrams.of(matrix, shape.heads, shape.kv_heads).groups, plan.kept)
            x, held_x = pairs.x.float(), pairs.held_x.float()
            examples = Examples(x, oracle.keep(pairs.a), held_x, oracle.keep(pairs.held_a), plan.kept)
            hidden = x.shape[1]
            start = RouterWeights.drawn(hidden, min(self.rank, hidden), plan.width, self.seed + plan.layer)
            return Lesson(examples, weighted_bce, start)

        return train_routers(self, training, plans, SiteKind.ATTN_IN, self.ahead, lesson, target=SiteKind.ATTN_OUT)
