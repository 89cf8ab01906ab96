"""Copies of the neurons that lists name, gathered after a prompt: of one sequence, or of all that a batch keeps."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from actsparse.engine.step.plans import Selection, SlicedPlan
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


def capacity_of(plan: GatePlan) -> int:
    """How many neurons a layer of copies has to hold, rounded up so that few sizes exist; waits for the device."""
    assert plan.selection is not None
    neurons = plan.selection.index.shape[1]
    grain = max(1, neurons // STEPS)
    return min(neurons, math.ceil(max(1, int(plan.selection.count.max())) / grain) * grain)


def room(plan: GatePlan, translator: Translator, capacity: int) -> SlicedPlan:
    """Buffers for copies, with a mask for every sequence where there are several; nothing is in them yet."""
    copies, masks = empty_plan(translator.weights, capacity), _masks(plan)
    if not masks:
        return copies
    mask = torch.zeros(len(masks), len(masks[0]), capacity, device=translator.weights.device)
    return replace(copies, mask=mask)


def gather(plan: GatePlan, translator: Translator, copies: SlicedPlan) -> None:
    """Fill `copies` with the listed neurons' weights, and with each sequence's mask over them."""
    assert plan.selection is not None
    capacity = copies.down.shape[1]
    copies.selection.index.copy_(plan.selection.index[:, :capacity])
    copies.selection.count.copy_(plan.selection.count)
    fill(copies, translator.weights, translator.stacked(Unit.DOWN))
    if copies.mask is not None:
        own = torch.stack(_masks(plan))
        places = copies.selection.index.long()[:, None].expand(-1, own.shape[1], -1)
        live = torch.arange(capacity, device=own.device) < copies.selection.count[:, None]
        copies.mask.copy_(own.gather(2, places) * live[:, None])


def in_place(plan: GatePlan, translator: Translator) -> SlicedPlan:
    """All neurons of a batch, read where they are; `mask_all` says what each sequence keeps."""
    weights, masks = translator.weights, _masks(plan)
    layers, neurons = weights.shape.layers, weights.shape.neurons
    every = torch.arange(neurons, dtype=torch.int32, device=weights.device)
    count = torch.full((layers,), neurons, dtype=torch.int32, device=weights.device)
    return SlicedPlan(
        gate_up=weights.gate_up,
        down=translator.stacked(Unit.DOWN),
        selection=Selection(index=every.repeat(layers, 1), count=count),
        gate_up_bias=weights.gate_up_bias,
        mask=torch.zeros(layers, len(masks[0]), neurons, device=weights.device),
    )


def mask_all(plan: GatePlan, every: SlicedPlan) -> None:
    """Let each sequence keep its own neurons of all."""
    assert every.mask is not None
    every.mask.copy_(torch.stack(_masks(plan)))


def _masks(plan: GatePlan) -> list[Tensor]:
    """The mask [batch, neurons] of each layer; none for a single sequence."""
    return [work.mlp.mask for work in plan.layers if isinstance(work.mlp, Listed) and work.mlp.mask is not None]
