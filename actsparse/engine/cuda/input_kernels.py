"""Triton kernels of the input-sparse product. Import only where triton is installed (`availability.has_triton`)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what is inside @triton.jit, and how it is launched, is Triton's language and not Python's)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # outputs of a program
ROWS = 16  # weight rows that a program loads at once
MAX_SLICE = 1024  # inputs that a program compacts


def product(
    weight_rows: Tensor,
    x: Tensor,
    threshold: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    add: bool,
    atomics: bool,
) -> None:
    """out [outputs] = (add: out +) sum of x_i * weight_rows[i] over |x_i| * score_i >= threshold, plus bias.

    Every program compacts its own slice of x and reads the rows kept, whole. `atomics` adds the sums of the slices in
    no fixed order; otherwise a second kernel adds them in slice order.
    """
    inputs, outputs = weight_rows.shape
    tiles = triton.cdiv(outputs, BLOCK)
    programs = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
    slices = max(1, min(programs // tiles, inputs // 32), math.ceil(inputs / MAX_SLICE))
    length = math.ceil(inputs / slices)
    rows = torch.empty(slices * tiles * length, dtype=torch.int32, device=x.device)
    if atomics:
        if not add:
            out.zero_()
        partial = out
    else:
        partial = torch.empty(slices, outputs, dtype=torch.float32, device=x.device)
    _partial[(tiles, slices)](  # pyright: ignore[reportIndexIssue]
        weight_rows,
        x,
        x if score is None else score,
        threshold,
        x if bias is None else bias,
        rows,
        partial,
        inputs,
        outputs,
        weight_rows.stride(0),
        length,
        HAS_SCORE=score is not None,
        HAS_BIAS=atomics and bias is not None,
        ATOMIC=atomics,
        BLOCK=BLOCK,
        SLICE=triton.next_power_of_2(length),
        ROWS=ROWS,
        num_warps=8,
    )
    if not atomics:
        _sum_slices[(tiles,)](  # pyright: ignore[reportIndexIssue]
            partial, x if bias is None else bias, out, slices, outputs, HAS_BIAS=bias is not None, ADD=add, BLOCK=BLOCK
        )


@triton.jit
def _partial(
    weight_ptr,
    x_ptr,
    score_ptr,
    threshold_ptr,
    bias_ptr,
    rows_ptr,
    partial_ptr,
    inputs,
    outputs,
    stride,
    length,
    HAS_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    inside = tl.arange(0, SLICE)
    at = part * length + inside
    live = (inside < length) & (at < inputs)
    value = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    size = tl.abs(value)
    if HAS_SCORE:
        size = size * tl.load(score_ptr + at, mask=live, other=0.0)
    keep = live & (size >= tl.load(threshold_ptr)) & (value != 0.0)
    kept = keep.to(tl.int32)
    total = tl.sum(kept, axis=0)
    # The list goes through memory (in practice L1): Triton has no scatter within a program.
    mine = rows_ptr + (part * tl.num_programs(0) + tile) * length
    tl.store(mine + tl.cumsum(kept, axis=0) - 1, at, mask=keep)
    tl.debug_barrier()
    column = tile * BLOCK + tl.arange(0, BLOCK)
    exists = column < outputs
    total_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, total, ROWS):
        item = first + tl.arange(0, ROWS)
        row = tl.load(mine + item, mask=item < total, other=0)
        x = tl.load(x_ptr + row, mask=item < total, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + row[:, None].to(tl.int64) * stride + column[None, :],
            mask=(item < total)[:, None] & exists[None, :],
            other=0.0,
        )
        total_sum += tl.sum(x[:, None] * weight.to(tl.float32), axis=0)
    if ATOMIC:
        if HAS_BIAS and part == 0:
            total_sum += tl.load(bias_ptr + column, mask=exists, other=0.0)
        tl.atomic_add(partial_ptr + column, total_sum, mask=exists)
    else:
        tl.store(partial_ptr + part * outputs + column, total_sum, mask=exists)


@triton.jit
def _sum_slices(
    partial_ptr, bias_ptr, out_ptr, slices, outputs, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < outputs
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(slices):
        total += tl.load(partial_ptr + part * outputs + column, mask=exists, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=exists, other=0.0)
    if ADD:
        total += tl.load(out_ptr + column, mask=exists, other=0.0)
    tl.store(out_ptr + column, total, mask=exists)
