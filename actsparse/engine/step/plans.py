"""What a decode step reads: one record a kind of plan. Their tensors can be refilled without a new capture."""

from dataclasses import dataclass

from torch import Tensor

from actsparse.engine.step.weights import InputRows

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, slots=True)
class DensePlan:
    """Reads every weight."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The neurons kept: index [layers, capacity] int32, ascending up to count [layers] int32, then zeros."""

    index: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlicedPlan:
    """The kept neurons' weights: gate_up [layers, 2 * capacity, width], gate first; down [layers, capacity, width].

    Rows from `selection.count` on are zero. gate_up_bias [layers, 2 * capacity] where the model has one. mask [layers,
    batch, capacity] float32: which of them a sequence of a batch keeps, where sequences keep different ones.
    """

    gate_up: Tensor
    down: Tensor
    selection: Selection
    gate_up_bias: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexedPlan:
    """The kept neurons by index into the full weights; down_rows: [layers, neurons, width]."""

    down_rows: Tensor
    selection: Selection


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronPlan:
    """Which neurons to keep, per token: threshold [layers, 1] or [layers, neurons], float32.

    One of gate and up is dense (`first`: "gate" or "up") and decides which rows of the other and of down are read. CATS
    (arXiv 2404.08763) keeps |act(gate)| >= t, CHESS (arXiv 2409.01366) has one threshold per neuron, COUNTDOWN (arXiv
    2505.17701) decides by |up|. At best 3 / (1 + 2 * density) of the dense MLP's speed: a third is always read.
    down_rows: [layers, neurons, width].
    """

    threshold: Tensor
    down_rows: Tensor
    first: str = "gate"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputScores:
    """Column norms per projection (WINA), float32: the share of an input's size that its weights decide.

    qkv: [layers, 3, width]; out: [layers, 1, query_width]; gate_up: [layers, 2, width]; down: [layers, 1, neurons].
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputPlan:
    """Which input channels to keep, per token and projection: threshold [layers, 7] float32, as in `PROJECTIONS`.

    TEAL (arXiv 2408.14690) keeps |x_i| >= t, WINA (arXiv 2505.19427) |x_i| * ||W[:, i]|| >= t; a threshold of 0 keeps
    all. Where tops [layers][7] is not 0, a projection keeps that many of its inputs, the largest, and each token sets
    the threshold anew; of equals at the edge all are kept. Results do not depend on timing unless `fast_atomics`, which
    adds partial sums to the residual in any order.
    """

    weights: InputRows
    threshold: Tensor
    scores: InputScores | None = None
    tops: tuple[tuple[int, ...], ...] | None = None
    fast_atomics: bool = False


Plan = DensePlan | SlicedPlan | IndexedPlan | NeuronPlan | InputPlan


def column_norms(weight: Tensor, parts: tuple[int, ...]) -> Tensor:
    """[layers, len(parts), inputs]: norms of the columns of each part of weight [layers, outputs, inputs], float32."""
    norms = weight.new_empty(weight.shape[0], len(parts), weight.shape[2]).float()
    for layer, matrix in enumerate(weight):
        for part, rows in enumerate(matrix.split(parts)):
            norms[layer, part] = rows.float().norm(dim=0)
    return norms
