"""Random pruning: the floor that every method must be far above."""

from dataclasses import dataclass, replace

import torch

from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import FixedGate, LayerGates

SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """k neurons of each layer drawn uniformly; without a seed, the mean of three seeds."""

    seed: int = -1

    name = "random"
    summary = "neurons drawn at random, mean of three seeds (control)"
    paper = "control"
    decides = Decides.OFFLINE
    serves_experts = True

    def __post_init__(self) -> None:
        if not -1 <= self.seed < 2**63:
            raise PlanError(f"random: seed must be from 0 to 2^63 - 1, not {self.seed}", "correct the value")

    def replicas(self) -> tuple[Method, ...]:
        return (self,) if self.seed >= 0 else tuple(replace(self, seed=seed) for seed in range(SEEDS))

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = counted_layers(budget, self.name, calibration.widths)
        generator = torch.Generator().manual_seed(max(0, self.seed))
        masks = {}
        for one in layers:
            chosen = torch.randperm(one.width, generator=generator)[: one.kept]
            masks[f"layers.{one.layer}.mask"] = torch.zeros(one.width, dtype=torch.bool).index_fill_(0, chosen, True)
        return counted_fit(layers, masks)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
