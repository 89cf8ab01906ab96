"""One pass over rows of activations: the sums that `core.streaming` keeps, added in place.

Compiled kernels do it on a CPU (`row_sums_cpu`) and on a GPU (`row_sums_cuda`); without a compiler torch does, as
written here. A row's sums are taken in float32, sums over rows in float64: they do not depend on how rows were grouped
into calls, up to the last bits of a float64.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core import row_sums_cpu, row_sums_cuda
from actsparse.core.masks import row_threshold
from actsparse.core.rows import ColumnSums, EntrySums, PositionSums, Rows

HALVES = (torch.bfloat16, torch.float16)


def add_entries(rows: Rows, into: EntrySums, first: int) -> None:
    """Add every entry of the rows; bins count |x| by exponent and ten bits of mantissa, from bin `first` on."""
    if not len(rows):
        return
    if row_sums_cpu.serves(rows):
        row_sums_cpu.add_entries(rows, into, first)
    elif row_sums_cuda.serves(rows.flat):
        row_sums_cuda.add_entries(rows, into, first)
    else:
        into.seen[0] += len(rows) * rows.width
        (_add_halves if rows.flat.dtype in HALVES else _add_floats)(rows.values(), into, first)


def _add_floats(x: Float[Tensor, "rows width"], into: EntrySums, first: int) -> None:
    raw = x.float()
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
    if not len(rows):
        nothing = torch.zeros(0, dtype=torch.int64, device=rows.flat.device)
        return nothing.double(), nothing
    if row_sums_cpu.serves(rows):
        return row_sums_cpu.add_columns(rows, norms, k, into)
    if row_sums_cuda.serves(rows.flat):
        return row_sums_cuda.add_columns(rows, norms, k, into)
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
    into.add(found)
    return row_squares.double(), rows.width - nonzero.sum(dim=1)


def add_squares(rows: Rows, into: Float[Tensor, " width"]) -> None:
    """Add x^2 of every row to `into` (float64)."""
    if not len(rows):
        return
    if row_sums_cpu.serves(rows):
        row_sums_cpu.add_squares(rows, into)
    elif row_sums_cuda.serves(rows.flat):
        row_sums_cuda.add_squares(rows, into)
    else:
        into += rows.numbers().square().sum(dim=0, dtype=torch.float64)


def add_positions(
    positions: Int[Tensor, " rows"],
    squares: Float[Tensor, " rows"],
    zeros: Int[Tensor, " rows"],
    into: PositionSums,
) -> None:
    """Add what `add_columns` found in rows that stand at these positions of their sequences."""
    if len(positions) and row_sums_cuda.available(positions.device):
        row_sums_cuda.add_positions(positions, squares, zeros, into)
    else:
        edges = torch.tensor(into.edges, device=positions.device)
        places = torch.bucketize(positions, edges, right=True) - 1
        # a product instead of index_add_, whose order on a GPU changes from run to run
        inside = places == torch.arange(len(edges), device=positions.device)[:, None]
        into.square.add_(inside.double() @ squares)
        into.zeros.add_((inside.double() @ zeros.double()).long())
        into.tokens.add_(inside.sum(dim=1))
        into.seen.add_(torch.stack([inside.sum(), (squares > 0).sum()]))


def summed_norms(o: Float[Tensor, "tokens width"], grams: Float[Tensor, "units part part"]) -> Float[Tensor, " units"]:
    """`output_norms` summed over tokens (float64)."""
    if len(o) and row_sums_cuda.serves(o):
        return row_sums_cuda.summed_norms(o, grams)
    return output_norms(o, grams).sum(dim=0, dtype=torch.float64)


def summed_product_norms(o: Float[Tensor, "tokens width"], weight: Float[Tensor, "hidden width"]) -> Float[Tensor, "1"]:
    """||W o|| summed over tokens (float64), from the matrix itself."""
    on_gpu = len(o) and row_sums_cuda.serves(o)
    product = row_sums_cuda.products(o, weight) if on_gpu else o.float() @ weight.float().T
    return torch.linalg.vector_norm(product, dim=1).sum(dtype=torch.float64)[None]


def output_norms(
    o: Float[Tensor, "tokens width"], grams: Float[Tensor, "units part part"]
) -> Float[Tensor, "tokens units"]:
    """||W_h o_h|| of each unit (head or group) at each token, from the units' W_h^T W_h."""
    parts = o.view(o.shape[0], grams.shape[0], grams.shape[1])
    weighed = torch.bmm(parts.transpose(0, 1), grams)
    return torch.linalg.vecdot(weighed.transpose(0, 1), parts).clamp_min(0).sqrt()


def numbers(rows: Rows) -> Float[Tensor, "rows width"]:
    """The rows for `summed_norms`: NaN and infinities as zeros, in a type that loses nothing."""
    return row_sums_cuda.numbers(rows) if len(rows) and row_sums_cuda.serves(rows.flat) else rows.numbers()
