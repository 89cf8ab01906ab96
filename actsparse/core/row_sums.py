"""One pass over rows of activations: the sums that `core.streaming` keeps, added in place.

On a CPU a small C++ kernel does it (`kernels/row_sums.cpp`), on all threads that torch has; on a GPU a CUDA kernel for
16-bit activations (`kernels/row_sums.cu`); elsewhere, and without a compiler, torch does. A row's sums are taken in
float32, sums over rows in float64: they do not depend on how rows were grouped into calls, up to the last bits of a
float64.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.masks import row_threshold
from actsparse.core.native import gpu_library, in_parts, library

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

HALVES = (torch.bfloat16, torch.float16)
# Rows that one block of a GPU's column kernel sums.
GPU_CHUNK = 256


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: `flat` [all, width], `index` [rows] on its device (None: every row in order)."""

    flat: Float[Tensor, "all width"]
    index: Int[Tensor, " rows"] | None = None

    @classmethod
    def of(cls, x: Float[Tensor, "*batch width"], index: Int[Tensor, " rows"] | None = None) -> "Rows":
        """Rows of a tensor of any shape, numbered over its leading axes."""
        flat = x.detach().reshape(-1, x.shape[-1])
        return cls(flat if flat.stride(-1) == 1 else flat.contiguous(), index)

    def __len__(self) -> int:
        return len(self.flat if self.index is None else self.index)

    @property
    def width(self) -> int:
        return self.flat.shape[-1]

    def values(self) -> Float[Tensor, "rows width"]:
        """The rows themselves."""
        return self.flat if self.index is None else self.flat[self.index]

    def numbers(self) -> Float[Tensor, "rows width"]:
        """The rows in float32, NaN and infinities as zeros."""
        return self.values().float().nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class EntrySums:
    """Accumulators over entries: counts [bins] of |x|, `apart` [3] (zeros, below, above the bins), `sums` [4] float64
    (of x, |x|, x^2; the largest |x|), `seen` [2] (entries, those NaN or infinite)."""

    counts: Int[Tensor, " bins"]
    apart: Int[Tensor, "3"]
    sums: Float[Tensor, "4"]
    seen: Int[Tensor, "2"]


@dataclass(frozen=True)
class ColumnSums:
    """Accumulators of every neuron, [neurons] each: counts int64, sums float64."""

    active: Int[Tensor, " neurons"]
    nonzero: Int[Tensor, " neurons"]
    total: Float[Tensor, " neurons"]
    total_abs: Float[Tensor, " neurons"]
    share_square: Float[Tensor, " neurons"]
    largest: Float[Tensor, " neurons"]


def add_entries(rows: Rows, into: EntrySums, first: int) -> None:
    """Add every entry of the rows; bins count |x| by exponent and ten bits of mantissa, from bin `first` on."""
    if not len(rows):
        return
    into.seen[0] += len(rows) * rows.width
    if (call := _native("actsparse_moments", rows)) is not None:
        bins = len(into.counts)

        def part(span: slice) -> tuple[int, list[Tensor]]:
            found = [torch.zeros_like(one) for one in (into.counts, into.apart, into.sums)]
            bad = call(*_arguments(rows, span), c_int32(first), c_int32(bins), *map(_address, found))
            return bad, found

        for bad, (counts, apart, sums) in in_parts(len(rows), rows.width, part):
            into.seen[1] += bad
            into.counts.add_(counts)
            into.apart.add_(apart)
            largest = torch.maximum(into.sums[3], sums[3])
            into.sums.add_(sums)
            into.sums[3] = largest
        return
    if (gpu := _gpu(rows)) is not None:
        found = torch.zeros(1 << 15, dtype=torch.int64, device=rows.flat.device)
        blocks = min(len(rows), torch.cuda.get_device_properties(rows.flat.device).multi_processor_count)
        totals = torch.zeros(blocks, dtype=torch.float64, device=rows.flat.device)
        gpu("actsparse_patterns", found, totals, c_int32(blocks))
        known = _patterns(rows.flat.dtype, rows.flat.device, first, len(into.counts))
        _add_patterns(found, known, totals.sum(), into)
        return
    if rows.flat.dtype in HALVES:
        _add_halves(rows.values(), into, first)
        return
    raw = rows.values().float()
    into.seen[1] += (~raw.isfinite()).sum()
    x = raw.nan_to_num(0.0, 0.0, 0.0)
    magnitude = x.abs()
    add_counts(x, into.counts, into.apart, first)
    squares = torch.linalg.vecdot(x, x)
    sums = torch.stack([part.double().sum() for part in (x.sum(dim=1), magnitude.sum(dim=1), squares)])
    into.sums[:3] += sums
    into.sums[3] = torch.maximum(into.sums[3], magnitude.max().double())


def _add_halves(x: Float[Tensor, "rows width"], into: EntrySums, first: int) -> None:
    """Entries of 16 bits: how often each of the 65,536 patterns occurs says everything, exactly, in one pass."""
    patterns = x.contiguous().view(torch.int16).view(-1).long().bitwise_and_(0xFFFF)
    found = torch.zeros(1 << 16, dtype=torch.int32, device=x.device)
    found.scatter_add_(0, patterns, torch.ones(1, dtype=torch.int32, device=x.device).expand_as(patterns))
    known = _patterns(x.dtype, x.device, first, len(into.counts))
    _add_patterns(found.long(), known, (found * known.value).sum(), into)


@dataclass(frozen=True)
class _Patterns:
    """What every pattern of a 16-bit type stands for: its `value` and `powers` (|x|, x^2) in float64, 0 where it is NaN
    or infinite, and its `slot`: 0 not finite, 1 zero, 2 below the bins, then the bins, the last above them."""

    value: Float[Tensor, "65536"]
    powers: Float[Tensor, "65536 2"]
    slot: Int[Tensor, "65536"]


@cache
def _patterns(dtype: torch.dtype, device: torch.device, first: int, bins: int) -> _Patterns:
    raw = torch.arange(1 << 16, device=device).to(torch.int16).view(dtype).double()
    value = torch.where(raw.isfinite(), raw, 0.0)
    size = value.abs()
    slot = ((size.float().view(torch.int32) >> 13) - (first - 1)).clamp_(0, bins + 1).long() + 2
    slot = torch.where(raw.isfinite(), torch.where(size == 0, 1, slot), 0)
    return _Patterns(value, torch.stack([size, size.square()], dim=1), slot)


def _add_patterns(found: Int[Tensor, " patterns"], known: _Patterns, total: Tensor, into: EntrySums) -> None:
    """Add entries of which `found` hold each of the first `patterns` patterns, and whose finite ones sum to `total`.

    Nothing here picks by a mask: a GPU would have to be waited for.
    """
    powers, count = known.powers[: len(found)], len(into.counts)
    slots = torch.zeros(count + 4, dtype=torch.int64, device=found.device)
    slots.index_add_(0, known.slot[: len(found)], found)
    into.seen[1] += slots[0]
    into.counts.add_(slots[3:-1])
    into.apart.add_(torch.stack([slots[0] + slots[1], slots[2], slots[-1]]))
    into.sums[:3] += torch.cat([total.view(1), found.double() @ powers])
    into.sums[3] = torch.maximum(into.sums[3], torch.where(found > 0, powers[:, 0], 0.0).max())


def add_counts(x: Float[Tensor, "..."], counts: Int[Tensor, " bins"], apart: Int[Tensor, "3"], first: int) -> None:
    """Count |x| into bins, and the zeros, smaller and larger entries (NaN and infinity too) apart."""
    bins = len(counts)
    bits = x.detach().float().contiguous().view(-1).view(torch.int32) & 0x7FFFFFFF
    place = ((bits >> 13) - (first - 1)).clamp_(0, bins + 1)
    if place.device.type == "cpu":
        found = torch.bincount(place, minlength=bins + 2)
    else:
        # bincount looks for its largest value first, and waits for the device to know it
        found = torch.zeros(bins + 2, dtype=torch.int32, device=place.device)
        found.scatter_add_(0, place.long(), torch.ones_like(place))
    zeros = (bits == 0).sum()
    counts += found[1:-1]
    apart += torch.stack([zeros, found[0] - zeros, found[-1].to(zeros.dtype)])


def add_columns(
    rows: Rows, norms: Float[Tensor, " neurons"], k: int, into: ColumnSums
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Add the rows of neuron activations; (||a||^2 float64, zero entries) of every row.

    A neuron is active in a row where |a| * norm is among the row's k largest, and not 0.
    """
    squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.flat.device)
    zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.flat.device)
    if not len(rows):
        return squares, zeros
    if (call := _native("actsparse_neurons", rows)) is not None:
        norms = norms.float().contiguous()

        def part(span: slice) -> ColumnSums:
            found = ColumnSums(*(torch.zeros_like(one) for one in _parts(into)))
            outputs = (*_parts(found), squares[span], zeros[span])
            call(*_arguments(rows, span), _address(norms), c_int64(k), *map(_address, outputs))
            return found

        for found in in_parts(len(rows), rows.width, part):
            _add_columns(found, into)
        return squares, zeros
    if (gpu := _gpu(rows)) is not None:
        device, chunks = rows.flat.device, -(-len(rows) // GPU_CHUNK)
        sums = torch.zeros(chunks, 3, rows.width, dtype=torch.float64, device=device)
        least = torch.zeros(len(rows), device=device)
        largest = torch.zeros(rows.width, device=device)
        outputs = (least, squares, zeros, into.active, into.nonzero, sums, largest)
        gpu("actsparse_columns_of", norms.float().contiguous(), c_int64(k), *outputs, c_int32(GPU_CHUNK))
        for mine, more in zip((into.total, into.total_abs, into.share_square), sums.sum(dim=0), strict=True):
            mine.add_(more)
        torch.maximum(into.largest, largest.double(), out=into.largest)
        return squares, zeros
    a = rows.numbers()
    magnitude = a.abs()
    scores = magnitude * norms
    row_squares = torch.linalg.vecdot(a, a)
    inverse = torch.where(row_squares > 0, 1.0 / row_squares, torch.zeros_like(row_squares))
    nonzero = a != 0
    found = ColumnSums(
        active=((scores >= row_threshold(scores, k)) & (scores > 0)).sum(dim=0),
        nonzero=nonzero.sum(dim=0),
        total=a.sum(dim=0, dtype=torch.float64),
        total_abs=magnitude.sum(dim=0, dtype=torch.float64),
        share_square=(a.square() * inverse[:, None]).sum(dim=0, dtype=torch.float64),
        largest=magnitude.amax(dim=0).double(),
    )
    _add_columns(found, into)
    return row_squares.double(), rows.width - nonzero.sum(dim=1)


def add_squares(rows: Rows, into: Float[Tensor, " width"]) -> None:
    """Add x^2 of every row to `into` (float64)."""
    if not len(rows):
        return
    if (call := _native("actsparse_squares", rows)) is not None:

        def part(span: slice) -> Tensor:
            found = torch.zeros_like(into)
            call(*_arguments(rows, span), _address(found))
            return found

        for found in in_parts(len(rows), rows.width, part):
            into.add_(found)
        return
    if (gpu := _gpu(rows)) is not None:
        shape = (-(-len(rows) // GPU_CHUNK), rows.width)
        sums = torch.zeros(shape, dtype=torch.float64, device=rows.flat.device)
        gpu("actsparse_squares_of", sums, c_int32(GPU_CHUNK))
        into.add_(sums.sum(dim=0))
        return
    into += rows.numbers().square().sum(dim=0, dtype=torch.float64)


def _add_columns(found: ColumnSums, into: ColumnSums) -> None:
    for mine, more in zip(_parts(into)[:5], _parts(found)[:5], strict=True):
        mine.add_(more)
    torch.maximum(into.largest, found.largest, out=into.largest)


def _parts(sums: ColumnSums) -> tuple[Tensor, ...]:
    """In the order of the kernel's arguments."""
    return (sums.active, sums.nonzero, sums.total, sums.total_abs, sums.share_square, sums.largest)


def _native(name: str, rows: Rows) -> Callable[..., int] | None:
    """The compiled kernel, where it serves these rows."""
    if rows.flat.device.type != "cpu" or rows.flat.dtype not in NATIVE_DTYPES:
        return None
    found = library("row_sums.cpp")
    if found is None:
        return None
    call = found[name]
    call.restype = c_int64 if name == "actsparse_moments" else None
    return call


def _gpu(rows: Rows) -> Callable[..., None] | None:
    """How to run a kernel of `row_sums.cu` over these rows; None where they are not 16-bit numbers on a GPU that has
    the kernels. Raises RuntimeError where a launch fails."""
    flat = rows.flat
    if flat.device.type != "cuda" or flat.dtype not in HALVES:
        return None
    kernels = gpu_library("row_sums.cu", flat.device)
    if kernels is None:
        return None
    index = torch.arange(len(rows), device=flat.device) if rows.index is None else rows.index.contiguous()

    def run(name: str, *arguments: Tensor | ctypes._SimpleCData) -> None:
        plain = [_address(one) if isinstance(one, Tensor) else one for one in arguments]
        with torch.cuda.device(flat.device):
            stream = c_void_p(torch.cuda.current_stream().cuda_stream)
            code = kernels[name](
                _address(flat), c_int64(flat.stride(0)), _address(index), c_int64(len(index)), c_int64(rows.width),
                c_int32(1 + HALVES.index(flat.dtype)), *plain, stream,
            )  # fmt: skip
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    return run


def _arguments(rows: Rows, span: slice) -> tuple[object, ...]:
    index = (torch.arange(len(rows)) if rows.index is None else rows.index)[span].contiguous()
    # the caller keeps `index` alive as part of the tuple until the call has returned
    return (
        _address(rows.flat), c_int64(rows.flat.stride(0)), _Held(index), c_int64(len(index)), c_int64(rows.width),
        c_int32(NATIVE_DTYPES[rows.flat.dtype]),
    )  # fmt: skip


class _Held(ctypes.c_void_p):
    """The address of a tensor that must live as long as the argument does."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.data_ptr())
        self.tensor = tensor


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
