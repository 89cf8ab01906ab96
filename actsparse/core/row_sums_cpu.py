"""`core.row_sums` on a CPU: a small C++ kernel (`kernels/row_sums.cpp`), on all threads that torch has."""

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.native import in_parts, library
from actsparse.core.rows import ColumnSums, EntrySums, Rows

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def serves(rows: Rows) -> bool:
    """Whether the compiled kernel takes these rows: numbers of a type that it knows, and a compiler to build it."""
    flat = rows.flat
    return flat.device.type == "cpu" and flat.dtype in DTYPES and library("row_sums.cpp") is not None


def add_entries(rows: Rows, into: EntrySums, first: int) -> None:
    """See `row_sums.add_entries`."""
    call, bins = _kernel("actsparse_moments", c_int64), len(into.counts)

    def part(span: slice) -> tuple[int, list[Tensor]]:
        found = [torch.zeros_like(one) for one in (into.counts, into.apart, into.sums)]
        bad = call(*_arguments(rows, span), c_int32(first), c_int32(bins), *map(_address, found))
        return bad, found

    into.seen[0] += len(rows) * rows.width
    for bad, (counts, apart, sums) in in_parts(len(rows), rows.width, part):
        into.seen[1] += bad
        into.counts.add_(counts)
        into.apart.add_(apart)
        largest = torch.maximum(into.sums[3], sums[3])
        into.sums.add_(sums)
        into.sums[3] = largest


def add_columns(
    rows: Rows, norms: Float[Tensor, " neurons"], k: int, into: ColumnSums
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """See `row_sums.add_columns`."""
    call, norms = _kernel("actsparse_neurons"), norms.float().contiguous()
    squares, zeros = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)

    def part(span: slice) -> ColumnSums:
        found = ColumnSums(*(torch.zeros_like(one) for one in into.parts()))
        outputs = (*found.parts(), squares[span], zeros[span])
        call(*_arguments(rows, span), _address(norms), c_int64(k), *map(_address, outputs))
        return found

    for found in in_parts(len(rows), rows.width, part):
        into.add(found)
    return squares, zeros


def add_squares(rows: Rows, into: Float[Tensor, " width"]) -> None:
    """See `row_sums.add_squares`."""
    call = _kernel("actsparse_squares")

    def part(span: slice) -> Tensor:
        found = torch.zeros_like(into)
        call(*_arguments(rows, span), _address(found))
        return found

    for found in in_parts(len(rows), rows.width, part):
        into.add_(found)


def _kernel(name: str, result: type[c_int64] | None = None) -> Callable[..., int]:
    found = library("row_sums.cpp")
    assert found is not None, "ask serves() first"
    call = found[name]
    call.restype = result
    return call


def _arguments(rows: Rows, span: slice) -> tuple[object, ...]:
    index = (torch.arange(len(rows)) if rows.index is None else rows.index)[span].contiguous()
    # the caller keeps `index` alive as part of the tuple until the call has returned
    return (
        _address(rows.flat), c_int64(rows.flat.stride(0)), _Held(index), c_int64(len(index)), c_int64(rows.width),
        c_int32(DTYPES[rows.flat.dtype]),
    )  # fmt: skip


class _Held(ctypes.c_void_p):
    """The address of a tensor that must live as long as the argument does."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.data_ptr())
        self.tensor = tensor


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
