"""Histograms of magnitudes that merge exactly, and quantiles read from them.

A bin is the exponent and the first ten bits of the mantissa of a float32: bins are log-spaced by octave, at most
0.098 % wide (a quantile is off by at most 0.049 %), and found by integer arithmetic, so that every device and every
batch size counts alike. They cover 2^-27 (7.5e-9) to 2^17; zeros, smaller and larger values are counted apart.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import floor

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOWEST_EXPONENT, HIGHEST_EXPONENT = -27, 17
BINS_PER_OCTAVE = 1024
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE
_FIRST = (LOWEST_EXPONENT + 127) * BINS_PER_OCTAVE
_ALL = 256 * BINS_PER_OCTAVE
PARALLEL_FROM = 1 << 18


@dataclass
class LogHistogram:
    """Counts of |x|: `counts` [bins] within range; `zeros`, `below` and `above` apart."""

    counts: Int[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    zeros: int = 0
    below: int = 0
    above: int = 0

    @property
    def total(self) -> int:
        return self.zeros + self.below + self.above + int(self.counts.sum())

    def add(self, x: Float[Tensor, "..."]) -> None:
        """Count the magnitudes of `x` (any shape; NaN and infinity count as above)."""
        bits = x.detach().float().contiguous().view(-1).view(torch.int32)
        found = _count_bins((bits >> 13).bitwise_and_(_ALL - 1)).cpu()
        zeros = int((bits & 0x7FFFFFFF == 0).sum()) if found[0] else 0
        self.counts += found[_FIRST : _FIRST + BINS]
        self.zeros += zeros
        self.below += int(found[:_FIRST].sum()) - zeros
        self.above += int(found[_FIRST + BINS :].sum())

    def merge(self, other: "LogHistogram") -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts
        self.zeros += other.zeros
        self.below += other.below
        self.above += other.above

    def quantile(self, share: float) -> float:
        """The floor(share * n)-th smallest magnitude, counting from 0, within 0.049 % (methods.md, section 0)."""
        return quantile_of(*self.trimmed(), share)

    def trimmed(self) -> tuple[Int[Tensor, " bins"], Float[Tensor, " edges"]]:
        """The non-empty stretch of counts and its edges, one more; the first bin, from 0, holds zeros and smaller."""
        used = self.counts.nonzero()
        first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        counts = torch.cat([torch.tensor([self.zeros + self.below]), self.counts[first:stop]])
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), bin_edges(first, stop + 1)])
        if self.above:
            top = torch.tensor([2.0**HIGHEST_EXPONENT, float("inf")], dtype=torch.float64)
            gap = stop < BINS or not len(used)
            counts = torch.cat([counts, torch.tensor([0, self.above] if gap else [self.above])])
            edges = torch.cat([edges if gap else edges[:-1], top])
        return counts, edges

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"counts": self.counts, "apart": torch.tensor([self.zeros, self.below, self.above])}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "LogHistogram":
        """The histogram whose `tensors()` these are."""
        zeros, below, above = (int(value) for value in state["apart"])
        return cls(state["counts"], zeros, below, above)


def _count_bins(bins: Int[Tensor, " n"]) -> Int[Tensor, " all"]:
    """torch.bincount on as many threads as torch has: it runs on one alone, and gives up the interpreter meanwhile."""
    parts = torch.get_num_threads()
    if bins.device.type != "cpu" or parts == 1 or len(bins) < PARALLEL_FROM:
        return torch.bincount(bins, minlength=_ALL)
    with ThreadPoolExecutor(parts) as pool:
        return torch.stack(list(pool.map(_bincount, bins.chunk(parts)))).sum(dim=0)


def _bincount(bins: Int[Tensor, " n"]) -> Int[Tensor, " all"]:
    return torch.bincount(bins, minlength=_ALL)


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


def share_below(counts: Int[Tensor, " bins"], edges: Float[Tensor, " edges"], threshold: float) -> float:
    """The share of counted magnitudes in bins whose middle is under the threshold."""
    total = int(counts.sum())
    middles = (edges[:-1] + edges[1:]) / 2
    middles[:1] = 0.0
    return float(counts[middles < threshold].sum()) / total if total else float("nan")
