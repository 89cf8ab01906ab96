"""Deja Vu: a small trained router guesses which neurons a token will use (arXiv 2310.17157; RODA in MOYU's terms).

Two linear layers without bias or non-linearity, hidden -> rank -> neurons; the k neurons of the largest logits are
kept. `input` says what it reads: the MLP's own normed input (`sequential`), the block's input, which attention reads at
the same time (`parallel`), or the input of the block before (`lookahead`), whose prediction can run ahead of its use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.overlap import topk_masks
from actsparse.core.router_training import Examples, RouterWeights, weighted_bce
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit, counted_layers
from actsparse.methods.gates import FixedGate, LayerGates, Router, TokenGate
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
from actsparse.results import LayerPlan, SiteKind

RouterInput = Literal["sequential", "parallel", "lookahead"]


@dataclass(frozen=True, kw_only=True)
class DejaVu(TrainedMethod):
    """The k neurons that a trained router expects to be used, token by token.

    A token's labels are, on models whose activation makes exact zeros (ReLU), the neurons with a != 0, and on others
    its top k by |a|*||w||.
    """

    input: RouterInput = "sequential"
    rank: int = 1000

    name = "dejavu"
    summary = "neurons that a trained router expects the token to use"
    paper = "arXiv 2310.17157"
    decides = Decides.TOKEN
    needs = (SiteKind.MLP_IN,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise PlanError(f"dejavu: rank must be at least 1, not {self.rank}", "the paper's is 1000")

    @property
    def site(self) -> SiteKind:
        """Where the router reads."""
        return SiteKind.MLP_IN if self.input == "sequential" else SiteKind.ATTN_IN

    @property
    def ahead(self) -> int:
        """How many layers before the one that it decides for."""
        return 1 if self.input == "lookahead" else 0

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        plans = counted_layers(budget, self.name, calibration.widths)
        routed = chosen_layers(self.name, self.layers, len(plans))
        plans = [plan if plan.layer in routed else replace(plan, kept=plan.width) for plan in plans]
        wanted = [plan for plan in plans if plan.kept != plan.width]
        tensors: dict[str, Tensor] = {}
        for plan, router in zip(wanted, self._routers(calibration, wanted), strict=True):
            plans[plan.layer] = judged_plan(plan, router, plan.kept or 0, plan.width)
            tensors |= router_tensors(plan.layer, router)
        return counted_fit(plans, tensors)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.layers[layer]
        assert plan.kept is not None
        if plan.kept == plan.width:
            return LayerGates(neurons=FixedGate(torch.ones(plan.width, dtype=torch.bool)))
        router = router_of(layer, fit)
        rule = Router(router.first, router.second, plan.kept)
        return LayerGates(
            neurons=TokenGate(self.site, rule, ahead=self.ahead),
            mlp_extra_bytes=sum(part.numel() * part.element_size() for part in (router.first, router.second)),
        )

    def check_fit(self, fit: Fit, hidden: int) -> None:
        for plan in fit.layers:
            if plan.kept != plan.width:
                check_router(f"dejavu, layer {plan.layer}", router_of(plan.layer, fit), hidden, plan.width)

    def _routers(self, calibration: Calibration, plans: Sequence[LayerPlan]) -> list[LayerRouter]:
        if not plans:
            return []
        training = calibration.training()
        if self.weights:
            return read_routers(self, training, plans, lambda plan: plan.width)
        exact = training.exact_zeros
        norms = {plan.layer: calibration.down_norms(plan.layer) for plan in plans} if not exact else {}

        def lesson(plan: LayerPlan, pairs: LayerPairs) -> Lesson:
            assert plan.kept is not None
            hidden, weights = pairs.x.shape[1], norms.get(plan.layer)
            examples = Examples(
                pairs.x.float(),
                used_neurons(pairs.a, weights, plan.kept),
                pairs.held_x.float(),
                used_neurons(pairs.held_a, weights, plan.kept),
                plan.kept,
            )
            start = RouterWeights.drawn(hidden, min(self.rank, hidden), plan.width, self.seed + plan.layer)
            return Lesson(examples, weighted_bce, start)

        return train_routers(self, training, plans, self.site, self.ahead, lesson)


def used_neurons(
    a: Float[Tensor, "tokens neurons"], norms: Float[Tensor, " neurons"] | None, kept: int
) -> Bool[Tensor, "tokens neurons"]:
    """A token's labels: its top `kept` neurons by |a|*||w||; without `norms` those with a != 0."""
    if norms is None:
        return a != 0
    return topk_masks(a.abs().float() * norms.to(a.device), kept / a.shape[1])
