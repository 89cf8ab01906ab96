"""`core.row_sums` on a GPU: CUDA kernels (`kernels/row_sums.cu`). Nothing here waits for the device.

A sum over rows leaves every chunk of rows in a place of its own and is folded in order: the same bits in every run.
"""

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.native import gpu_library
from actsparse.core.rows import ColumnSums, EntrySums, PositionSums, Rows

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Rows that one block sums: at least so many, and more where there would be too many parts to fold.
ROWS_A_CHUNK, CHUNKS = 128, 256


def available(device: torch.device) -> bool:
    """Whether this is a GPU, and there is a compiler to build its kernels."""
    return device.type == "cuda" and gpu_library("row_sums.cu", device) is not None


def serves(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor: numbers of a type that they know on such a GPU."""
    return tensor.dtype in DTYPES and available(tensor.device)


@cache
def shared_bytes(device: torch.device) -> int:
    """The shared memory that a block may ask for; with less, the same is done more slowly."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def add_entries(rows: Rows, into: EntrySums, first: int) -> None:
    """See `row_sums.add_entries`."""
    blocks = min(len(rows), _multiprocessors(rows.flat.device))
    parts = torch.empty(3 * blocks, dtype=torch.float64, device=rows.flat.device)
    _run(
        "actsparse_entries", rows.flat.device, *_arguments(rows),
        into.counts, c_int32(first), c_int32(len(into.counts)), into.apart, into.seen, into.sums, parts,
        c_int32(blocks), c_int32(shared_bytes(rows.flat.device)),
    )  # fmt: skip


def add_columns(
    rows: Rows, norms: Float[Tensor, " neurons"], k: int, into: ColumnSums
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """See `row_sums.add_columns`."""
    device, count = rows.flat.device, len(rows)
    least, inverse = torch.empty(2, count, device=device)
    squares = torch.empty(count, dtype=torch.float64, device=device)
    zeros = torch.empty(count, dtype=torch.int64, device=device)
    _run(
        "actsparse_neurons", device, *_arguments(rows),
        norms.float().contiguous(), c_int64(k), least, inverse, squares, zeros, *into.parts(), _parts(rows, 3),
        c_int32(_chunk(count)), c_int32(shared_bytes(device)),
    )  # fmt: skip
    return squares, zeros


def add_squares(rows: Rows, into: Float[Tensor, " width"]) -> None:
    """See `row_sums.add_squares`."""
    _run("actsparse_squares", rows.flat.device, *_arguments(rows), into, _parts(rows, 1), c_int32(_chunk(len(rows))))


def add_positions(
    positions: Int[Tensor, " rows"],
    squares: Float[Tensor, " rows"],
    zeros: Int[Tensor, " rows"],
    into: PositionSums,
) -> None:
    """See `row_sums.add_positions`."""
    edges = _edges(into.edges, positions.device)
    _run(
        "actsparse_positions", positions.device, positions.contiguous(), c_int64(len(positions)), edges,
        c_int32(len(edges)), squares, zeros, into.square, into.zeros, into.tokens, into.seen,
    )  # fmt: skip


def numbers(rows: Rows) -> Float[Tensor, "rows width"]:
    """The rows, NaN and infinities as zeros: in bfloat16 where they are that, which loses nothing, else in float32."""
    dtype = torch.bfloat16 if rows.flat.dtype == torch.bfloat16 else torch.float32
    found = torch.empty(len(rows), rows.width, device=rows.flat.device, dtype=dtype)
    _run("actsparse_numbers", rows.flat.device, *_arguments(rows), found)
    return found


def summed_norms(o: Float[Tensor, "tokens width"], grams: Float[Tensor, "units part part"]) -> Float[Tensor, " units"]:
    """See `row_sums.summed_norms`; o as `numbers` gives it."""
    units, part, _ = grams.shape
    by_unit = o.view(len(o), units, part).transpose(0, 1)
    if o.dtype == torch.bfloat16:
        # tensor cores take two bfloat16 numbers, whose sum is a float32 up to 2^-17 of it
        high = grams.bfloat16()
        both = torch.cat([high, (grams - high).bfloat16()], dim=2)
        weighed = torch.bmm(by_unit, both, out_dtype=torch.float32)
    else:
        weighed = torch.bmm(by_unit, grams)
    chunk = _chunk(len(o))
    parts = torch.empty(units, -(-len(o) // chunk), dtype=torch.float64, device=o.device)
    sizes = (c_int64(len(o)), c_int32(units), c_int32(weighed.shape[2] // part), c_int32(part))
    _run("actsparse_unit_norms", o.device, weighed, o, c_int32(DTYPES[o.dtype]), *sizes, parts, c_int32(chunk))
    return parts.sum(dim=1)


def products(o: Float[Tensor, "tokens width"], weight: Float[Tensor, "hidden width"]) -> Float[Tensor, "tokens hidden"]:
    """W o in float32; o as `numbers` gives it."""
    if o.dtype == weight.dtype == torch.bfloat16:
        return torch.bmm(o[None], weight.T[None], out_dtype=torch.float32)[0]
    return o.float() @ weight.float().T


Argument = Tensor | ctypes._SimpleCData | None


def _run(name: str, device: torch.device, *arguments: Argument) -> None:
    """Launch on the current stream of the device. Raises RuntimeError where that fails."""
    plain = [c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in arguments]
    stream = c_void_p(torch.cuda.current_stream(device).cuda_stream)
    # entering a device costs as much as a launch, and most often it is the one at work
    here = nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    with here:
        code = _kernel(name, device)(*plain, stream)
    if code:
        raise RuntimeError(f"{name}: CUDA error {code}")


@cache
def _kernel(name: str, device: torch.device) -> Callable[..., int]:
    kernels = gpu_library("row_sums.cu", device)
    assert kernels is not None, "ask serves() first"
    return kernels[name]


def _arguments(rows: Rows) -> tuple[Argument, ...]:
    index = None if rows.index is None else rows.index.contiguous()
    sizes = (c_int64(len(rows)), c_int64(rows.width), c_int32(DTYPES[rows.flat.dtype]))
    return (rows.flat, c_int64(rows.flat.stride(0)), index, *sizes)


def _parts(rows: Rows, kinds: int) -> Tensor:
    """Room for what every chunk of rows finds for every column."""
    shape = (-(-len(rows) // _chunk(len(rows))), kinds, rows.width)
    return torch.empty(shape, dtype=torch.float64, device=rows.flat.device)


def _chunk(rows: int) -> int:
    return max(ROWS_A_CHUNK, -(-rows // CHUNKS))


@cache
def _edges(edges: tuple[int, ...], device: torch.device) -> Int[Tensor, " bins"]:
    return torch.tensor(edges, device=device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
