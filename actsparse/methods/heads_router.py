"""Trained routers over heads: which KV groups a token will use, guessed before attention runs (arXiv 2310.17157).

Deja Vu's router with KV groups as units: two linear layers without bias or non-linearity, hidden -> rank -> groups.
Labels are the oracle's: a token's k groups of the largest output norm. `input` says what it reads: the attention's own
normed input (`sequential`), or that of the layer before (`lookahead`).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from actsparse.core.head_norms import unit_grams
from actsparse.core.router_training import Examples
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit
from actsparse.methods.gates import HeadGate, LayerGates
from actsparse.methods.heads_oracle import LargestGroups, Policy, check_dense_layers, group_plans
from actsparse.methods.logit_router import LogitMethod, rule_bytes, rule_of
from actsparse.methods.trained_method import LayerRouter, chosen_layers, judged_plan, router_tensors
from actsparse.methods.training import LayerPairs
from actsparse.results import KvPolicy, LayerPlan, SiteKind, Unit


@dataclass(frozen=True, kw_only=True)
class HeadsRouter(LogitMethod):
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

    @property
    def site(self) -> SiteKind:
        """Where the router reads."""
        return SiteKind.ATTN_IN

    @property
    def ahead(self) -> int:
        """How many layers before the one that it decides for."""
        return 1 if self.input == "lookahead" else 0

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        plans = group_plans(calibration, budget, self.dense_layers, self.name)
        routed = chosen_layers(self.name, self.layers, len(plans))
        wanted = [plan for plan in plans if plan.kept != plan.width and plan.layer in routed]
        shape = calibration.attention

        def examples(plan: LayerPlan, pairs: LayerPairs) -> Examples:
            assert plan.kept is not None
            grams = unit_grams(calibration.output_matrix(plan.layer), shape.kv_heads)
            oracle = LargestGroups(grams, plan.kept)
            used, held = oracle.keep(pairs.a), oracle.keep(pairs.held_a)
            return Examples(pairs.x.float(), used, pairs.held_x.float(), held, plan.kept)

        routers = self.learned(calibration, wanted, examples, SiteKind.ATTN_OUT)
        tensors: dict[str, Tensor] = {}
        for layer, router in routers.items():
            tensors |= router_tensors(layer, router)
        return counted_fit([self._judged(plan, routers) for plan in plans], tensors)

    def _judged(self, plan: LayerPlan, routers: dict[int, LayerRouter]) -> LayerPlan:
        if plan.layer not in routers:
            return LayerPlan(layer=plan.layer, unit=Unit.KV_GROUP, width=plan.width, kept=plan.width)
        return judged_plan(plan, routers[plan.layer], plan.kept or 0, plan.width)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.of(layer, Unit.KV_GROUP)
        if plan.kept is None or plan.kept == plan.width:
            return LayerGates()
        rule = rule_of(plan, fit)
        return LayerGates(
            heads=HeadGate(self.site, rule, ahead=self.ahead, policy=KvPolicy(self.policy)),
            attention_extra_bytes=rule_bytes(rule),
        )
