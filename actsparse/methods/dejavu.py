"""Deja Vu: a small trained router guesses which neurons a token will use (arXiv 2310.17157; RODA in MOYU's terms).

Two linear layers without bias or non-linearity, hidden -> rank -> neurons; the k neurons of the largest logits are
kept. `input` says what it reads: the MLP's own normed input (`sequential`), the block's input, which attention reads at
the same time (`parallel`), or the input of the block before (`lookahead`), whose prediction can run ahead of its use.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.overlap import topk_masks
from actsparse.core.router_training import Examples
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_fit, counted_layers
from actsparse.methods.gates import FixedGate, LayerGates, TokenGate
from actsparse.methods.logit_router import LogitMethod, rule_bytes, rule_of
from actsparse.methods.trained_method import chosen_layers, judged_plan, router_tensors
from actsparse.methods.training import LayerPairs
from actsparse.results import LayerPlan, SiteKind

RouterInput = Literal["sequential", "parallel", "lookahead"]


@dataclass(frozen=True, kw_only=True)
class DejaVu(LogitMethod):
    """The k neurons that a trained router expects to be used, token by token.

    A token's labels are, on models whose activation makes exact zeros (ReLU), the neurons with a != 0, and on others
    its top k by |a|*||w||.
    """

    input: RouterInput = "sequential"

    name = "dejavu"
    summary = "neurons that a trained router expects the token to use"
    paper = "arXiv 2310.17157"
    decides = Decides.TOKEN
    needs = (SiteKind.MLP_IN,)

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
        exact = self._exact_zeros(calibration, wanted)

        def examples(plan: LayerPlan, pairs: LayerPairs) -> Examples:
            assert plan.kept is not None
            norms = None if exact else calibration.down_norms(plan.layer)
            used, held = (used_neurons(a, norms, plan.kept) for a in (pairs.a, pairs.held_a))
            return Examples(pairs.x.float(), used, pairs.held_x.float(), held, plan.kept)

        tensors: dict[str, Tensor] = {}
        for layer, router in self.learned(calibration, wanted, examples).items():
            plans[layer] = judged_plan(plans[layer], router, plans[layer].kept or 0, plans[layer].width)
            tensors |= router_tensors(layer, router)
        return counted_fit(plans, tensors)

    def _exact_zeros(self, calibration: Calibration, plans: list[LayerPlan]) -> bool:
        """Whether the model's own zeros are the labels; not asked where nothing is trained."""
        return bool(plans) and not self.weights and calibration.training().exact_zeros

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.layers[layer]
        if plan.kept == plan.width:
            return LayerGates(neurons=FixedGate(torch.ones(plan.width, dtype=torch.bool)))
        rule = rule_of(plan, fit)
        return LayerGates(neurons=TokenGate(self.site, rule, ahead=self.ahead), mlp_extra_bytes=rule_bytes(rule))


def used_neurons(
    a: Float[Tensor, "tokens neurons"], norms: Float[Tensor, " neurons"] | None, kept: int
) -> Bool[Tensor, "tokens neurons"]:
    """A token's labels: its top `kept` neurons by |a|*||w||; without `norms` those with a != 0."""
    if norms is None:
        return a != 0
    return topk_masks(a.abs().float() * norms.to(a.device), kept / a.shape[1])
