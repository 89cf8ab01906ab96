"""Copies of the neurons that lists name, gathered after a prompt: of one sequence, or of all that a batch keeps."""

import math
from dataclasses import replace

import torch

from actsparse.engine.step.plans import SlicedPlan
from actsparse.engine.step.sliced import empty_plan, fill
from actsparse.engine.step.translate import Translator
from actsparse.engine.step.work import GatePlan, Listed
from actsparse.results import Unit

PAYS = 0.95  # of the neurons; a larger union saves less than its own products and masks cost
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


def gather(plan: GatePlan, translator: Translator, known: SlicedPlan | None) -> SlicedPlan:
    """The listed neurons' weights, with every sequence's mask over them where there are several.

    In the buffers of `known` where they have its size.
    """
    assert plan.selection is not None
    neurons = plan.selection.index.shape[1]
    grain = max(1, neurons // STEPS)
    capacity = min(neurons, math.ceil(max(1, int(plan.selection.count.max())) / grain) * grain)
    masks = [work.mlp.mask for work in plan.layers if isinstance(work.mlp, Listed) and work.mlp.mask is not None]
    if known is None or known.down.shape[1] != capacity:
        known = empty_plan(translator.weights, capacity)
        if masks:
            mask = torch.zeros(len(masks), len(masks[0]), capacity, device=translator.weights.device)
            known = replace(known, mask=mask)
    known.selection.index.copy_(plan.selection.index[:, :capacity])
    known.selection.count.copy_(plan.selection.count)
    fill(known, translator.weights, translator.stacked(Unit.DOWN))
    if known.mask is not None:
        own = torch.stack(masks)
        places = known.selection.index.long()[:, None].expand(-1, own.shape[1], -1)
        live = torch.arange(capacity, device=own.device) < known.selection.count[:, None]
        known.mask.copy_(own.gather(2, places) * live[:, None])
    return known
