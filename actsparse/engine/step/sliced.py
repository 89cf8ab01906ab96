"""Sequence-level plans: the neurons kept for a sequence, gathered once after prefill into buffers that never move.

The buffers have a fixed capacity, so a step is captured once and every refill is seen by it. Selection and gathering
are a handful of launches over all layers at once: one stacked top-k or threshold, and two gathers of whole rows, down
being stored transposed. For short generations `IndexedPlan` reads the rows in place instead of copying them.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from actsparse.engine.step.plans import Selection, SlicedPlan
from actsparse.engine.step.weights import Weights
from actsparse.errors import PlanError

GRAIN = 64  # capacities are multiples of this


class Gatherer(Protocol):
    """Gathers rows faster than torch does."""

    def gather(self, target: Tensor, source: Tensor, index: Tensor, count: Tensor) -> None:
        """target [layers, parts, capacity, width] = the rows of source [layers, parts, rows, width] at `index`.

        index: [layers, capacity]; rows from `count` [layers] on become zero.
        """
        ...


def capacity_for(neurons: int) -> int:
    """`neurons` rounded up to a multiple of 64."""
    return math.ceil(neurons / GRAIN) * GRAIN


def empty_selection(weights: Weights, capacity: int) -> Selection:
    layers, device = weights.shape.layers, weights.device
    return Selection(
        index=torch.zeros(layers, capacity, dtype=torch.int32, device=device),
        count=torch.zeros(layers, dtype=torch.int32, device=device),
    )


def empty_plan(weights: Weights, capacity: int) -> SlicedPlan:
    """Buffers for up to `capacity` neurons a layer, holding none."""
    layers, width = weights.shape.layers, weights.shape.width
    return SlicedPlan(
        gate_up=weights.gate_up.new_zeros(layers, 2 * capacity, width),
        down=weights.gate_up.new_zeros(layers, capacity, width),
        selection=empty_selection(weights, capacity),
        gate_up_bias=None if weights.gate_up_bias is None else weights.gate_up_bias.new_zeros(layers, 2 * capacity),
    )


def select_top(selection: Selection, scores: Tensor, keep: int) -> None:
    """Fills `selection` with the `keep` neurons of highest score in every layer; scores: [layers, neurons]."""
    capacity = selection.index.shape[1]
    if not 0 < keep <= capacity:
        raise PlanError(f"{keep} neurons do not fit a capacity of {capacity}", "make the plan with a larger capacity")
    best = scores.topk(keep, dim=1, sorted=False).indices
    list_kept(selection, torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True))


def select_threshold(selection: Selection, scores: Tensor, threshold: Tensor) -> None:
    """Fills `selection` with the neurons whose score reaches the layer's threshold.

    scores: [layers, neurons]; threshold: [layers]. Waits for the device once, to see that all fit.
    """
    capacity = selection.index.shape[1]
    keep = scores >= threshold[:, None]
    most = int(keep.sum(1).max())
    if most > capacity:
        raise PlanError(f"{most} neurons do not fit a capacity of {capacity}", "make the plan with a larger capacity")
    list_kept(selection, keep)


def list_kept(selection: Selection, keep: Tensor) -> None:
    """Lists the neurons of keep [layers, neurons] in order; cheaper than sorting what a top-k returns."""
    capacity = selection.index.shape[1]
    running = keep.cumsum(1, dtype=torch.int32)
    place = torch.where(keep, running - 1, capacity).long()
    listed = selection.index.new_zeros(len(keep), capacity + 1)
    listed.scatter_(1, place, torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device).expand_as(place))
    selection.index.copy_(listed[:, :capacity])
    selection.count.copy_(running[:, -1])


def fill(plan: SlicedPlan, weights: Weights, down_rows: Tensor, gatherer: Gatherer | None = None) -> None:
    """Gathers the selected neurons of all layers into the plan's buffers, zeros behind them.

    down_rows: [layers, neurons, width]. `gatherer` None: torch's own gather.
    """
    shape, selection = weights.shape, plan.selection
    layers, capacity = selection.index.shape
    pairs = (
        (plan.gate_up.view(layers, 2, capacity, -1), weights.gate_up.view(layers, 2, shape.neurons, -1)),
        (plan.down.view(layers, 1, capacity, -1), down_rows.view(layers, 1, shape.neurons, -1)),
    )
    for target, source in pairs:
        if gatherer is None:
            _gather(target, source, selection)
        else:
            gatherer.gather(target, source, selection.index, selection.count)
    if plan.gate_up_bias is not None and weights.gate_up_bias is not None:
        biases = weights.gate_up_bias.view(layers, 2, shape.neurons)
        index = selection.index.long()[:, None].expand(-1, 2, -1)
        plan.gate_up_bias.copy_(biases.gather(2, index).flatten(1))


def _gather(target: Tensor, source: Tensor, selection: Selection) -> None:
    """target [layers, parts, capacity, width] from source [layers, parts, rows, width], a layer at a time."""
    capacity = target.shape[2]
    behind = torch.arange(capacity, device=target.device) >= selection.count[:, None]
    for layer, (to, rows) in enumerate(zip(target, source, strict=True)):
        for part, matrix in enumerate(rows):
            torch.index_select(matrix, 0, selection.index[layer], out=to[part])
        to.masked_fill_(behind[layer][None, :, None], 0.0)
