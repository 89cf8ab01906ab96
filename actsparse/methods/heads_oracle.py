"""Oracle over heads: the KV groups of the largest output norm, token by token. A ruler (methods.md, section 3).

The importance of a group is the norm of the SUM of its heads' outputs, ||sum_h W_o,h o_h||, before any post-norm: what
the residual stream would lose. Heads that share keys and values are kept or dropped together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.head_norms import unit_grams
from actsparse.core.masks import kept_count
from actsparse.core.overlap import topk_masks
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, drops_by_layer
from actsparse.methods.gates import HeadGate, LayerGates
from actsparse.results import KvPolicy, LayerPlan, SiteKind, Unit

Policy = Literal["compute_all", "drop", "zero", "lazy", "copy_prev"]


@dataclass(frozen=True)
class LargestGroups:
    """Keeps the `count` KV groups of the largest output norm. grams [kv_heads, width, width]: W_g^T W_g of each
    group's slice of the output projection."""

    grams: Float[Tensor, "kv_heads width width"]
    count: int

    def norms(self, x: Float[Tensor, "*tokens heads_width"]) -> Float[Tensor, "*tokens kv_heads"]:
        """||W_g o_g|| of every group of the heads' outputs, in float32 (float64 stays)."""
        wide = x if x.dtype == torch.float64 else x.float()
        parts = wide.reshape(*x.shape[:-1], len(self.grams), -1)
        grams = self.grams.to(device=wide.device, dtype=wide.dtype)
        return torch.einsum("...gi,gij,...gj->...g", parts, grams, parts).clamp_min(0).sqrt()

    def keep(self, x: Float[Tensor, "*tokens heads_width"]) -> Bool[Tensor, "*tokens kv_heads"]:
        """Exactly `count` groups a token; among equals the lower index."""
        return topk_masks(self.norms(x), self.count / len(self.grams))


@dataclass(frozen=True, kw_only=True)
class HeadsOracle(Method):
    """The k KV groups of the largest output norm. `policy`: what becomes of a dropped group's keys and values;
    `dense_layers`: the first layers, which keep every head."""

    policy: Policy = "compute_all"
    dense_layers: int = 1

    name = "heads-oracle"
    summary = "exact top KV groups of each token by the norm of what they add (ruler)"
    paper = "arXiv 2310.17157, 2505.14884"
    decides = Decides.TOKEN
    serves_experts = True
    needs = (SiteKind.ATTN_OUT,)
    saves = frozenset({"q", "o"})
    has_engine = False
    ideal = True

    def __post_init__(self) -> None:
        check_dense_layers(self.dense_layers, self.name)

    @property
    def needs_replay(self) -> bool:
        return True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = group_plans(calibration, budget, self.dense_layers, self.name)
        shape = calibration.attention
        tensors = {
            f"layers.{one.layer}.grams": unit_grams(calibration.output_matrix(one.layer), shape.kv_heads).contiguous()
            for one in layers
            if one.kept != one.width
        }
        return counted_fit(layers, tensors)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.of(layer, Unit.KV_GROUP)
        if plan.kept is None or plan.kept == plan.width:
            return LayerGates()
        rule = LargestGroups(fit.tensors[f"layers.{layer}.grams"], plan.kept)
        return LayerGates(heads=HeadGate(SiteKind.ATTN_OUT, rule, policy=KvPolicy(self.policy)))


def group_plans(calibration: Calibration, budget: Budget, dense_layers: int, method: str) -> list[LayerPlan]:
    """One entry a layer: k = max(1, floor(r*G + 0.5)) of its G KV groups, all of them in the first `dense_layers`."""
    groups, layers = calibration.attention.kv_heads, 1 + max(place.layer for place in calibration.ffns)
    return [
        LayerPlan(
            layer=layer,
            unit=Unit.KV_GROUP,
            width=groups,
            kept=groups if layer < dense_layers else kept_count(1 - drop, groups),
        )
        for layer, drop in enumerate(drops_by_layer(budget, method, layers))
    ]


def check_dense_layers(count: int, method: str) -> None:
    """Raise PlanError on a negative number of dense layers."""
    if count < 0:
        raise PlanError(f"{method}: dense_layers must be at least 0, not {count}", "the default is 1")
