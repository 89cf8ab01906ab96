"""A batch whose sequences keep different neurons, on a device where copies pay: the union gathered once per prompt."""

import math
from dataclasses import replace

import torch

from actsparse.engine.step.plans import SlicedPlan
from actsparse.engine.step.sliced import empty_plan, fill
from actsparse.engine.step.translate import Translator
from actsparse.engine.step.work import GatePlan, Listed
from actsparse.results import Unit

PAYS = 0.9  # of the neurons; a larger union saves less than its own products and masks cost
STEPS = 16  # capacities are multiples of a sixteenth, so that few steps are made ready


def lists_alone(plan: GatePlan) -> bool:
    """Whether all that a plan does is to keep lists of neurons, without anything in a dropped one's place."""
    return plan.selection is not None and all(
        isinstance(work.mlp, Listed) and work.mlp.fill is None and not work.channels and work.heads is None
        for work in plan.layers
    )


def union_density(plan: GatePlan) -> float:
    """The share of neurons that any sequence keeps, over all layers; waits for the device."""
    assert plan.selection is not None
    return float(plan.selection.count.double().mean()) / plan.selection.index.shape[1]


def gather_union(plan: GatePlan, translator: Translator, known: SlicedPlan | None) -> SlicedPlan:
    """The union's weights and every sequence's mask over them: in the buffers of `known` where they have its size."""
    assert plan.selection is not None
    neurons = plan.selection.index.shape[1]
    grain = max(1, neurons // STEPS)
    capacity = min(neurons, math.ceil(int(plan.selection.count.max()) / grain) * grain)
    masks = torch.stack([work.mlp.mask for work in plan.layers if isinstance(work.mlp, Listed)])  # pyright: ignore
    if known is None or known.down.shape[1] != capacity:
        known = empty_plan(translator.weights, capacity)
        known = replace(known, mask=torch.zeros(*masks.shape[:2], capacity, device=masks.device))
    assert known.mask is not None
    known.selection.index.copy_(plan.selection.index[:, :capacity])
    known.selection.count.copy_(plan.selection.count)
    fill(known, translator.weights, translator.stacked(Unit.DOWN))
    places = known.selection.index.long()[:, None].expand(-1, masks.shape[1], -1)
    live = torch.arange(capacity, device=masks.device) < known.selection.count[:, None]
    known.mask.copy_(masks.gather(2, places) * live[:, None])
    return known
