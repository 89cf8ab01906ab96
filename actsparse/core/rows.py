"""Rows of activations, and the accumulators that `core.row_sums` adds them to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def parts(self) -> tuple[Tensor, ...]:
        """In the order of the kernels' arguments."""
        return (self.active, self.nonzero, self.total, self.total_abs, self.share_square, self.largest)

    def add(self, found: "ColumnSums") -> None:
        """Add what was found in other rows."""
        for mine, more in zip(self.parts()[:5], found.parts()[:5], strict=True):
            mine.add_(more)
        torch.maximum(self.largest, found.largest, out=self.largest)


@dataclass(frozen=True)
class PositionSums:
    """Accumulators by position in the sequence, [bins] each: of ||a||^2 (float64), of zero entries, of tokens; `seen`
    [2]: tokens, and those with ||a|| > 0. Bin b holds positions from edges[b] up to the next edge."""

    edges: tuple[int, ...]
    square: Float[Tensor, " bins"]
    zeros: Int[Tensor, " bins"]
    tokens: Int[Tensor, " bins"]
    seen: Int[Tensor, "2"]
