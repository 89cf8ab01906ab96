"""Input-sparse products: y = W (x * m) with W stored input-major, so that an input dropped is a row not read.

TEAL (arXiv 2408.14690) keeps |x_i| >= t, WINA (arXiv 2505.19427) |x_i| * ||W[:, i]|| >= t. Every block compacts its own
slice of x, so there is no separate compaction kernel and no list in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.engine.cuda import reference
from actsparse.engine.cuda.availability import has_triton
from actsparse.engine.cuda.layout import InputRows

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


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
    """Thresholds [layers, 7] float32 on the device, in the order of `PROJECTIONS`.

    Results do not depend on timing unless `fast_atomics`, which adds partial sums to the residual in any order.
    """

    weights: InputRows
    threshold: Tensor
    scores: InputScores | None = None
    fast_atomics: bool = False


def input_sparse_product(
    weight_rows: Tensor,
    x: Tensor,
    threshold: Tensor,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    atomics: bool = False,
) -> Tensor:
    """What `reference.input_sparse` returns, [outputs] float32, by a Triton kernel that skips rows where it can run."""
    if not (has_triton() and x.is_cuda):
        return reference.input_sparse(weight_rows, x, threshold, score, bias)
    from actsparse.engine.cuda import input_kernels

    out = x.new_empty(weight_rows.shape[1])
    input_kernels.product(weight_rows, x, threshold, score, bias, out, add=False, atomics=atomics)
    return out


def column_norms(weight: Tensor, parts: tuple[int, ...]) -> Tensor:
    """[layers, len(parts), inputs]: norms of the columns of each part of weight [layers, outputs, inputs], float32."""
    norms = weight.new_empty(weight.shape[0], len(parts), weight.shape[2], dtype=torch.float32)
    for layer, matrix in enumerate(weight):
        for part, rows in enumerate(matrix.split(parts)):
            norms[layer, part] = rows.float().norm(dim=0)
    return norms
