"""Random pruning: the floor that every method must be far above."""

from dataclasses import dataclass, replace

import torch

from actsparse.core.masks import kept_count
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, drop_of
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.results import LayerPlan

SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """k neurons of each layer drawn uniformly; without a seed, the mean of three seeds."""

    seed: int = -1

    name = "random"
    summary = "neurons drawn at random, mean of three seeds (control)"
    paper = "control"
    decides = Decides.OFFLINE

    def __post_init__(self) -> None:
        if not -1 <= self.seed < 2**63:
            raise PlanError(f"random: seed must be from 0 to 2^63 - 1, not {self.seed}", "correct the value")

    def replicas(self) -> tuple[Method, ...]:
        return (self,) if self.seed >= 0 else tuple(replace(self, seed=seed) for seed in range(SEEDS))

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        density = 1 - drop_of(budget, self.name)
        generator = torch.Generator().manual_seed(max(0, self.seed))
        layers, masks = [], {}
        for layer, width in enumerate(calibration.widths):
            kept = kept_count(density, width)
            chosen = torch.randperm(width, generator=generator)[:kept]
            masks[f"layers.{layer}.mask"] = torch.zeros(width, dtype=torch.bool).index_fill_(0, chosen, True)
            layers.append(LayerPlan(layer=layer, width=width, kept=kept))
        return counted_fit(layers, masks)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
