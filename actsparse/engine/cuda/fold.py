"""Plans of gates that are the same in every layer, as the plans that the compiled step runs with fewest kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actsparse.engine.step.plans import (
    PROJECTIONS,
    DensePlan,
    IndexedPlan,
    InputPlan,
    InputScores,
    NeuronPlan,
    Plan,
    Selection,
)
from actsparse.engine.step.weights import InputRows
from actsparse.engine.step.work import Channels, Decided, GatePlan, LayerWork, Listed

PRODUCTS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))  # of `PROJECTIONS`: those that read the same inputs


def fold(plan: GatePlan, batch: int = 1) -> Plan | None:
    """`plan` as dense, as lists of neurons, or as a rule by size on the neurons or on all projections; or None.

    A rule by size is a threshold or, for a batch of 1, the number of inputs that a projection keeps. Lists are shared
    with `plan`; thresholds are copied, and a plan whose thresholds change has to be folded again.
    """
    works = plan.layers
    if plan.neurons is not None or any(work.heads is not None for work in works):
        return None
    if all(work.mlp is None and not work.channels for work in works):
        return DensePlan()
    if all(isinstance(work.mlp, Listed) and not work.channels for work in works):
        return _indexed_plan([work.mlp for work in works if isinstance(work.mlp, Listed)], plan.selection)
    if all(isinstance(work.mlp, Decided) and not work.channels for work in works):
        return _neuron_plan([work.mlp for work in works if isinstance(work.mlp, Decided)])
    return _input_plan(works, batch)


def _indexed_plan(layers: Sequence[Listed], selection: Selection | None) -> IndexedPlan | None:
    if selection is None or any(one.fill is not None or one.mask is not None for one in layers):
        return None
    return IndexedPlan(down_rows=_stacked([one.down_rows for one in layers]), selection=selection)


def _neuron_plan(layers: Sequence[Decided]) -> NeuronPlan | None:
    first = layers[0]
    same = all(one.gate_first == first.gate_first and one.threshold.shape == first.threshold.shape for one in layers)
    if not same or any(one.fill is not None for one in layers):
        return None
    return NeuronPlan(
        threshold=torch.stack([one.threshold for one in layers]),
        down_rows=_stacked([one.down_rows for one in layers]),
        first="gate" if first.gate_first else "up",
    )


def _input_plan(works: Sequence[LayerWork], batch: int) -> InputPlan | None:
    if any(work.mlp is not None or set(work.channels) != set(PROJECTIONS) for work in works):
        return None
    rules = [[work.channels[name] for name in PROJECTIONS] for work in works]
    if not all(_plain(one) for layer in rules for one in layer):
        return None
    qkv = [side_by_side([one.rows for one in layer[:3]]) for layer in rules]
    gate_up = [side_by_side([one.rows for one in layer[4:6]]) for layer in rules]
    if any(one is None for one in (*qkv, *gate_up)):
        return None
    weighed = [one.score is not None for layer in rules for one in layer]
    tops = tuple(tuple(_top(one) for one in layer) for layer in rules)
    mixed = any(any(layer[part]) != all(layer[part]) for layer in tops for part in PRODUCTS)
    if any(weighed) != all(weighed) or mixed or (batch > 1 and any(map(any, tops))):
        return None
    rows = InputRows(
        qkv=_stacked(qkv),
        out=_stacked([layer[3].rows for layer in rules]),
        gate_up=_stacked(gate_up),
        down=_stacked([layer[6].rows for layer in rules]),
    )
    threshold = torch.stack([torch.cat([_threshold(one) for one in layer]) for layer in rules])
    return InputPlan(
        weights=rows,
        threshold=threshold,
        scores=_scores(rules) if all(weighed) else None,
        tops=tops if any(map(any, tops)) else None,
    )


def _plain(rule: Channels) -> bool:
    one = rule.threshold is None or rule.threshold.numel() == 1
    return one and rule.basis is None and rule.correction is None


def _top(rule: Channels) -> int:
    """How many inputs a rule keeps, 0 where a threshold decides."""
    return 0 if rule.top >= len(rule.rows) else rule.top


def _threshold(rule: Channels) -> Tensor:
    return rule.rows.new_zeros(1).float() if rule.threshold is None else rule.threshold


def _scores(rules: Sequence[Sequence[Channels]]) -> InputScores:
    def scores(begin: int, end: int) -> Tensor:
        return torch.stack(
            [torch.stack([s for one in layer[begin:end] if (s := one.score) is not None]) for layer in rules]
        )

    return InputScores(qkv=scores(0, 3), out=scores(3, 4), gate_up=scores(4, 6), down=scores(6, 7))


def _stacked(layers: Sequence[Tensor | None]) -> Any:
    """One matrix a layer, indexed as a stacked tensor is, without a copy."""
    return tuple(layers)


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [inputs, all outputs] of which `parts` are neighbouring columns; None where they are not."""
    first = parts[0]
    at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.stride() != first.stride() or part.stride(1) != 1:
            return None
        at += part.shape[1] * part.element_size()
    outputs = sum(part.shape[1] for part in parts)
    return first.as_strided((first.shape[0], outputs), first.stride(), first.storage_offset())
