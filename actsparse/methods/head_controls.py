"""Controls of methods over heads: the same KV groups for all text, drawn or by calibration text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.head_norms import unit_grams
from actsparse.core.masks import top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit
from actsparse.methods.gates import Fixed, HeadGate, LayerGates
from actsparse.methods.heads_oracle import LargestGroups, Policy, check_dense_layers, group_plans
from actsparse.methods.random import Drawn
from actsparse.results import KvPolicy, LayerPlan, SiteKind, Unit

Masks = Sequence[Bool[Tensor, " kv_heads"]]


@dataclass(frozen=True, kw_only=True)
class FixedHeads(Method, ABC):
    """Keeps the same k KV groups at every token. `policy`: what becomes of a dropped group's keys and values;
    `dense_layers`: the first layers, which keep every head."""

    policy: Policy = "compute_all"
    dense_layers: int = 1

    paper = "control"
    decides = Decides.OFFLINE
    needs = ()
    saves = frozenset({"q", "o"})
    serves_experts = True
    has_engine = False
    is_control = True

    def __post_init__(self) -> None:
        check_dense_layers(self.dense_layers, self.name)

    @property
    def needs_replay(self) -> bool:
        return True

    @abstractmethod
    def masks(self, calibration: Calibration, layers: list[LayerPlan]) -> Masks:
        """What each layer keeps."""

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = group_plans(calibration, budget, self.dense_layers, self.name)
        masks = zip(layers, self.masks(calibration, layers), strict=True)
        return counted_fit(layers, {f"layers.{one.layer}.mask": mask for one, mask in masks})

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.of(layer, Unit.KV_GROUP)
        if plan.kept == plan.width:
            return LayerGates()
        rule = Fixed(fit.tensors[f"layers.{layer}.mask"])
        return LayerGates(heads=HeadGate(SiteKind.ATTN_IN, rule, policy=KvPolicy(self.policy)))


@dataclass(frozen=True, kw_only=True)
class HeadsRandom(FixedHeads, Drawn):
    """k KV groups of each layer, drawn uniformly; without a seed, the mean of three seeds."""

    name = "heads-random"
    summary = "KV groups drawn at random, mean of three seeds"

    def __post_init__(self) -> None:
        FixedHeads.__post_init__(self)
        Drawn.__post_init__(self)

    def masks(self, calibration: Calibration, layers: list[LayerPlan]) -> Masks:
        return self.drawn(layers)


@dataclass(frozen=True, kw_only=True)
class HeadsStatic(FixedHeads):
    """The k KV groups of each layer with the largest mean output norm on calibration text: what the oracle ranks a
    token's by."""

    name = "heads-static"
    summary = "KV groups that add most on the calibration text, the same for everything"

    def masks(self, calibration: Calibration, layers: list[LayerPlan]) -> Masks:
        shape = calibration.attention
        if all(one.kept == one.width for one in layers):
            # as in multi-query attention, whose one group is kept: nothing to rank
            return [torch.ones(one.width, dtype=torch.bool) for one in layers]
        grams = [unit_grams(calibration.output_matrix(one.layer), shape.kv_heads) for one in layers]
        means = calibration.pooled_attention([MeanNorms(LargestGroups(one, shape.kv_heads)) for one in grams])
        return [top_mask(mean, one.kept or one.width) for one, mean in zip(layers, means, strict=True)]


class MeanNorms:
    """The mean output norm of every KV group over the tokens added so far."""

    def __init__(self, groups: LargestGroups) -> None:
        self._groups = groups
        self._total: Tensor | None = None
        self._tokens = 0

    def add(self, rows: Float[Tensor, "tokens heads_width"]) -> None:
        """Add tokens: their concatenated heads."""
        found = self._groups.norms(rows).double().sum(dim=0)
        self._total = found if self._total is None else self._total + found
        self._tokens += len(rows)

    def value(self) -> Float[Tensor, " kv_heads"]:
        """Means, in float64. Raises ValueError before the first token."""
        if self._total is None:
            raise ValueError("the text has no token after the sink tokens")
        return self._total / self._tokens
