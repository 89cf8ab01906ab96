"""Histograms of magnitudes that merge exactly, and quantiles read from them.

A bin is the exponent and the first ten bits of the mantissa of a float32: bins are log-spaced by octave, at most
0.098 % wide (a quantile is off by at most 0.049 %), and found by integer arithmetic, so that every device and every
batch size counts alike. They cover 2^-27 (7.5e-9) to 2^17; zeros, smaller and larger values are counted apart.
"""

from dataclasses import dataclass, field
from math import floor

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.row_sums import add_counts

LOWEST_EXPONENT, HIGHEST_EXPONENT = -27, 17
BINS_PER_OCTAVE = 1024
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE
FIRST_BIN = (LOWEST_EXPONENT + 127) * BINS_PER_OCTAVE


@dataclass
class LogHistogram:
    """Counts of |x|: `counts` [bins] within range; `apart` [3] zeros, smaller and larger ones. Both int64, on any
    device."""

    counts: Int[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    apart: Int[Tensor, "3"] = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))

    @property
    def zeros(self) -> int:
        return int(self.apart[0])

    @property
    def below(self) -> int:
        return int(self.apart[1])

    @property
    def above(self) -> int:
        return int(self.apart[2])

    @property
    def total(self) -> int:
        return int(self.apart.sum()) + int(self.counts.sum())

    def add(self, x: Float[Tensor, "..."]) -> None:
        """Count the magnitudes of `x` (any shape; NaN and infinity count as above); the counts move to its device."""
        self.counts, self.apart = self.counts.to(x.device), self.apart.to(x.device)
        add_counts(x, self.counts, self.apart, FIRST_BIN)

    def merge(self, other: "LogHistogram") -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts.to(self.counts.device)
        self.apart += other.apart.to(self.apart.device)

    def quantile(self, share: float) -> float:
        """The floor(share * n)-th smallest magnitude, counting from 0, within 0.049 % (methods.md, section 0)."""
        return quantile_of(*self.trimmed(), share)

    def trimmed(self) -> tuple[Int[Tensor, " bins"], Float[Tensor, " edges"]]:
        """The non-empty stretch of counts and its edges, one more; the first bin, from 0, holds zeros and smaller."""
        inside = self.counts.cpu()
        used = inside.nonzero()
        first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        counts = torch.cat([torch.tensor([self.zeros + self.below]), inside[first:stop]])
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), bin_edges(first, stop + 1)])
        if self.above:
            top = torch.tensor([2.0**HIGHEST_EXPONENT, float("inf")], dtype=torch.float64)
            gap = stop < BINS or not len(used)
            counts = torch.cat([counts, torch.tensor([0, self.above] if gap else [self.above])])
            edges = torch.cat([edges if gap else edges[:-1], top])
        return counts, edges

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"counts": self.counts, "apart": self.apart}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "LogHistogram":
        """The histogram whose `tensors()` these are."""
        return cls(state["counts"], state["apart"])


def bin_edges(first: int, stop: int) -> Float[Tensor, " edges"]:
    """Lower edges of the bins `first` to `stop - 1`, in float64 (each is exact in float32)."""
    index = torch.arange(first, stop, dtype=torch.float64)
    octave, step = torch.floor(index / BINS_PER_OCTAVE), index % BINS_PER_OCTAVE
    return torch.exp2(octave + LOWEST_EXPONENT) * (1 + step / BINS_PER_OCTAVE)


def rank(share: float, n: int) -> int:
    """floor(share * n), not misled by shares such as 0.29 that binary fractions fall short of."""
    return floor(share * n + 1e-9)


def quantile_of(counts: Int[Tensor, " bins"], edges: Float[Tensor, " edges"], share: float) -> float:
    """The floor(share * n)-th smallest of counted magnitudes, as the middle of its bin; 0 in the first bin.

    NaN when nothing was counted; raises ValueError where `share` is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a quantile lies between 0 and 1, not {share}")
    cumulative = counts.cumsum(0)
    total = int(cumulative[-1]) if len(counts) else 0
    if total == 0:
        return float("nan")
    index = int(torch.searchsorted(cumulative, min(rank(share, total), total - 1), right=True))
    low, high = float(edges[index]), float(edges[index + 1])
    if index == 0:
        return 0.0
    return low if high == float("inf") else (low + high) / 2


@dataclass
class ExactQuantile:
    """The exact quantile of magnitudes that a histogram counted: the bin that holds it, and later its members.

    Two passes over the same values in bounded memory: the first counts, the second keeps the members of one bin.
    """

    low: float
    high: float
    before: int
    rank: int
    total: int
    members: list[Float[Tensor, " values"]] = field(default_factory=list)

    @classmethod
    def of(cls, histogram: LogHistogram, share: float) -> "ExactQuantile":
        """Where the floor(share * n)-th smallest lies; raises ValueError where nothing was counted."""
        counts, edges = histogram.trimmed()
        cumulative, total = counts.cumsum(0), histogram.total
        if not total:
            raise ValueError("nothing was counted")
        place = min(rank(share, total), total - 1)
        index = int(torch.searchsorted(cumulative, place, right=True))
        before = int(cumulative[index - 1]) if index else 0
        return cls(float(edges[index]), float(edges[index + 1]), before, place - before, total)

    def add(self, x: Float[Tensor, "..."]) -> None:
        """Keep the magnitudes of the bin."""
        values = x.abs()
        self.members.append(values[(values >= self.low) & (values < self.high)].flatten())

    def solve(self) -> tuple[float, float]:
        """The quantile, and the share of all values under it."""
        members = torch.cat(self.members).sort().values
        value = members[self.rank]
        return float(value), (self.before + int((members < value).sum())) / self.total


def share_below(counts: Int[Tensor, " bins"], edges: Float[Tensor, " edges"], threshold: float) -> float:
    """The share of counted magnitudes in bins whose middle is under the threshold."""
    total = int(counts.sum())
    middles = (edges[:-1] + edges[1:]) / 2
    middles[:1] = 0.0
    return float(counts[middles < threshold].sum()) / total if total else float("nan")
