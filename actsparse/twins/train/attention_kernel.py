"""Decode attention in Triton: it reads each row's cache up to that row's position and no further."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what is inside @triton.jit, and how it is launched, is Triton's language and not Python's)

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64  # positions read at a time
MIN_ROWS = 16  # fewest rows that tl.dot takes


def attend_fused(
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads head_dim"],
    value: Float[Tensor, "batch kv_heads head_dim"],
    keys: Float[Tensor, "batch kv_heads positions head_dim"],
    values: Float[Tensor, "batch kv_heads positions head_dim"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch heads head_dim"]:
    """What `decode.attend` returns: attention over the cache and the new token, which is added."""
    batch, kv_heads, positions, head_dim = keys.shape
    output = torch.empty_like(query)
    _attend[(batch, kv_heads)](  # pyright: ignore[reportIndexIssue]
        query,
        key,
        value,
        keys,
        values,
        position,
        output,
        head_dim**-0.5,
        POSITIONS=positions,
        KV_HEADS=kv_heads,
        GROUP=query.shape[1] // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=BLOCK,
        ROWS=MIN_ROWS,
    )
    return output


@triton.jit
def _attend(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    output_ptr,
    scale,
    POSITIONS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * KV_HEADS + tl.program_id(1)
    position = tl.load(position_ptr + tl.program_id(0))
    group = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, HEAD_DIM)
    grouped = (head * GROUP + group) * HEAD_DIM + column[None, :]
    query = tl.load(query_ptr + grouped, mask=group < GROUP, other=0.0)
    key = tl.load(key_ptr + head * HEAD_DIM + column)
    value = tl.load(value_ptr + head * HEAD_DIM + column)
    cache = head * POSITIONS * HEAD_DIM
    tl.store(keys_ptr + cache + position * HEAD_DIM + column, key)
    tl.store(values_ptr + cache + position * HEAD_DIM + column, value)

    # The new token opens the running softmax, so nothing just written has to be read back.
    peak = tl.sum(query.to(tl.float32) * key[None, :].to(tl.float32), 1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    mixed = tl.zeros([ROWS, HEAD_DIM], tl.float32) + value[None, :].to(tl.float32)
    for start in range(0, position, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        past = cache + row * HEAD_DIM + column[None, :]
        key_block = tl.load(keys_ptr + past, mask=row < position, other=0.0)
        value_block = tl.load(values_ptr + past, mask=row < position, other=0.0)
        score = tl.dot(query, tl.trans(key_block)) * scale
        seen = start + tl.arange(0, BLOCK)[None, :] < position
        score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(value_block.dtype), value_block)
        peak = new_peak
    mixed = mixed / total[:, None]
    tl.store(output_ptr + grouped, mixed.to(output_ptr.dtype.element_ty), mask=group < GROUP)
