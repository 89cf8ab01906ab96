"""A Triton reduction that reads a buffer and writes next to nothing. Import only where triton is installed."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (what is inside @triton.jit, and how it is launched, is Triton's language and not Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor, elements a program loads at once, warps.
LAUNCH_SHAPES = ((4, 4096, 8), (8, 2048, 4), (2, 8192, 16))


def read_all(buffer: Tensor, programs: int, block: int, warps: int) -> Tensor:
    """One int32 sum per program; buffer: int32, a multiple of `block` long."""
    count = programs * torch.cuda.get_device_properties(buffer.device).multi_processor_count
    out = torch.empty(count, dtype=torch.int32, device=buffer.device)
    _read[(count,)](  # pyright: ignore[reportIndexIssue]
        buffer, out, buffer.numel() // block, BLOCK=block, num_warps=warps
    )
    return out


@triton.jit
def _read(source_ptr, out_ptr, blocks, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.int32)
    at = tl.arange(0, BLOCK)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=4):
        total += tl.load(source_ptr + block.to(tl.int64) * BLOCK + at)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))
