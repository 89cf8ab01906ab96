"""Random pruning: the floor that every method must be far above."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool
from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.results import LayerPlan

SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Drawn(Method, ABC):
    """Units drawn uniformly, the same for every token; without a seed, the mean of three seeds."""

    seed: int = -1

    paper = "control"
    decides = Decides.OFFLINE
    needs = ()
    is_control = True

    def __post_init__(self) -> None:
        if not -1 <= self.seed < 2**63:
            raise PlanError(f"{self.name}: seed must be from 0 to 2^63 - 1, not {self.seed}", "correct the value")

    def replicas(self) -> tuple[Self, ...]:
        return (self,) if self.seed >= 0 else tuple(replace(self, seed=seed) for seed in range(SEEDS))

    def drawn(self, layers: Sequence[LayerPlan]) -> list[Bool[Tensor, " units"]]:
        """The mask of every entry, in order, by one generator."""
        generator = torch.Generator().manual_seed(max(0, self.seed))
        masks = []
        for one in layers:
            chosen = torch.randperm(one.width, generator=generator)[: one.kept]
            masks.append(torch.zeros(one.width, dtype=torch.bool).index_fill_(0, chosen, True))
        return masks


@dataclass(frozen=True, kw_only=True)
class Random(Drawn):
    """k neurons of each layer."""

    name = "random"
    summary = "neurons drawn at random, mean of three seeds"
    serves_experts = True

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = counted_layers(budget, self.name, calibration.widths)
        masks = zip(layers, self.drawn(layers), strict=True)
        return counted_fit(layers, {f"layers.{one.layer}.mask": mask for one, mask in masks})

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
