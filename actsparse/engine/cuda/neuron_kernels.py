"""Triton kernels of the neuron-sparse MLP. Import only where triton is installed (`availability.has_triton`)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what is inside @triton.jit, and how it is launched, is Triton's language and not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # rows of a program that reads all its rows
SPAN = 1024  # elements of a row that a program loads at once
CODES = {"silu": 0, "gelu_tanh": 1, "relu": 2, "identity": 3}


def threshold_rows(weight: Tensor, x: Tensor, threshold: Tensor, activation: str) -> Tensor:
    """[rows]: v = act(weight x) where |v| >= threshold (one value or one per row), else 0; float32."""
    rows, width = weight.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    step = 0 if threshold.numel() == 1 else 1
    _threshold_rows[(triton.cdiv(rows, ROWS),)](  # pyright: ignore[reportIndexIssue]
        weight, x, threshold, out, rows, width, weight.stride(0), step, ACT=CODES[activation], ROWS=ROWS, SPAN=SPAN
    )
    return out


def kept_rows(weight: Tensor, x: Tensor, factor: Tensor, activation: str) -> Tensor:
    """[rows]: factor * act(weight x) where factor is not zero, else 0; the other rows are not read; float32."""
    rows, width = weight.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    _kept_rows[(rows,)](  # pyright: ignore[reportIndexIssue]
        weight, x, factor, out, width, weight.stride(0), ACT=CODES[activation], SPAN=SPAN
    )
    return out


@triton.jit
def _activate(value, ACT: tl.constexpr):
    if ACT == 0:
        value = value * tl.sigmoid(value)
    elif ACT == 1:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(2 * inner)
    elif ACT == 2:
        value = tl.maximum(value, 0.0)
    return value


@triton.jit
def _threshold_rows(
    weight_ptr,
    x_ptr,
    threshold_ptr,
    out_ptr,
    rows,
    width,
    stride,
    threshold_step,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    total = tl.zeros([ROWS, SPAN], dtype=tl.float32)
    for first in range(0, width, SPAN):
        at = first + tl.arange(0, SPAN)
        x = tl.load(x_ptr + at, mask=at < width, other=0.0)
        weight = tl.load(
            weight_ptr + row[:, None].to(tl.int64) * stride + at[None, :],
            mask=exists[:, None] & (at < width)[None, :],
            other=0.0,
        )
        total += weight.to(tl.float32) * x[None, :]
    value = _activate(tl.sum(total, axis=1), ACT)
    threshold = tl.load(threshold_ptr + row * threshold_step, mask=exists, other=0.0)
    tl.store(out_ptr + row, tl.where(tl.abs(value) >= threshold, value, 0.0), mask=exists)


@triton.jit
def _kept_rows(weight_ptr, x_ptr, factor_ptr, out_ptr, width, stride, ACT: tl.constexpr, SPAN: tl.constexpr):
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row)
    if factor == 0.0:
        tl.store(out_ptr + row, 0.0)
    else:
        total = tl.zeros([SPAN], dtype=tl.float32)
        for first in range(0, width, SPAN):
            at = first + tl.arange(0, SPAN)
            x = tl.load(x_ptr + at, mask=at < width, other=0.0)
            weight = tl.load(weight_ptr + row.to(tl.int64) * stride + at, mask=at < width, other=0.0)
            total += weight.to(tl.float32) * x
        tl.store(out_ptr + row, factor * _activate(tl.sum(total, axis=0), ACT))
