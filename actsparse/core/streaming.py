"""Statistics that are fed rows, merge, and never grow with the number of tokens.

A row's sums are taken in float32, sums over rows in float64 (`core.row_sums`); so they do not depend on how sequences
were batched, and `merge(profile(a), profile(b))` equals `profile(a + b)`. All state lives on the device of the layer
that it describes, and nothing here waits for that device.
"""

from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.head_norms import HeadNorms
from actsparse.core.masks import kept_count
from actsparse.core.quantiles import FIRST_BIN, LogHistogram
from actsparse.core.row_sums import (
    add_columns,
    add_entries,
    add_positions,
    add_squares,
    numbers,
)
from actsparse.core.rows import ColumnSums, EntrySums, PositionSums, Rows

ACTIVE_DENSITY = 0.2
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


Sums = TypeVar("Sums", "Moments", "NeuronSums", "HeadSums")


def moved(sums: Sums, device: torch.device) -> Sums:
    """The same sums on a device; themselves where they are there."""
    if sums.seen.device == device:
        return sums
    return type(sums).of_tensors({name: tensor.to(device) for name, tensor in sums.tensors().items()})


@dataclass
class Moments:
    """Count, sums and extreme of every entry of one kind in one layer, with its histogram of magnitudes.

    `sums` [4] float64: of x, |x|, x^2, and the largest |x|; `seen` [2] int64: entries, and those NaN or infinite.
    """

    sums: Float[Tensor, "4"] = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seen: Int[Tensor, "2"] = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    histogram: LogHistogram = field(default_factory=LogHistogram)

    @property
    def count(self) -> int:
        return int(self.seen[0])

    @property
    def not_finite(self) -> int:
        return int(self.seen[1])

    @property
    def finite(self) -> int:
        """The entries that are numbers: all others stand in no statistic."""
        return self.count - self.not_finite

    @property
    def total(self) -> float:
        return float(self.sums[0])

    @property
    def total_abs(self) -> float:
        return float(self.sums[1])

    @property
    def total_square(self) -> float:
        return float(self.sums[2])

    @property
    def largest(self) -> float:
        return float(self.sums[3])

    def add(self, rows: Rows) -> None:
        """Add the activations of some tokens; entries that are NaN or infinite are counted apart from the rest."""
        before = self.seen[1].clone()
        into = EntrySums(self.histogram.counts, self.histogram.apart, self.sums, self.seen)
        add_entries(rows, into, FIRST_BIN)
        # the kernels read them as zeros
        self.histogram.apart[0] -= self.seen[1] - before

    def merge(self, other: "Moments") -> None:
        """Add what another accumulator saw."""
        more = other.sums.to(self.sums.device)
        largest = torch.maximum(self.sums[3], more[3])
        self.sums += more
        self.sums[3] = largest
        self.seen += other.seen.to(self.seen.device)
        self.histogram.merge(other.histogram)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"sums": self.sums, "seen": self.seen, **self.histogram.tensors()}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "Moments":
        """The accumulator whose `tensors()` these are."""
        return cls(state["sums"], state["seen"], LogHistogram.of_tensors(state))


@dataclass
class NeuronSums:
    """Sums over tokens for every neuron of a layer; `seen` [2]: positions, and those of them with ||a|| > 0.

    active: tokens in which |a|*||w|| is among the layer's top 20 % (and not 0); nonzero: a != 0; share_square:
    sum of (a / ||a||)^2 (GRIFFIN's statistic, squared and not yet averaged); square_up: sum of u^2.
    """

    seen: Int[Tensor, "2"]
    active: Int[Tensor, " neurons"]
    nonzero: Int[Tensor, " neurons"]
    total: Float[Tensor, " neurons"]
    total_abs: Float[Tensor, " neurons"]
    largest: Float[Tensor, " neurons"]
    share_square: Float[Tensor, " neurons"]
    square_up: Float[Tensor, " neurons"]
    position_square: Float[Tensor, " bins"]
    position_zeros: Int[Tensor, " bins"]
    position_tokens: Int[Tensor, " bins"]

    @classmethod
    def zeros(cls, neurons: int) -> "NeuronSums":
        """Nothing seen yet."""
        counts = {name: torch.zeros(neurons, dtype=torch.int64) for name in ("active", "nonzero")}
        names = ("total", "total_abs", "largest", "share_square", "square_up")
        sums = {name: torch.zeros(neurons, dtype=torch.float64) for name in names}
        bins = len(POSITION_EDGES)
        positions = {name: torch.zeros(bins, dtype=torch.int64) for name in ("position_zeros", "position_tokens")}
        square = torch.zeros(bins, dtype=torch.float64)
        return cls(torch.zeros(2, dtype=torch.int64), position_square=square, **counts, **sums, **positions)

    @property
    def tokens(self) -> int:
        return int(self.seen[0])

    @property
    def rows(self) -> int:
        return int(self.seen[1])

    def add(self, a: Rows, down_norms: Float[Tensor, " neurons"], positions: Int[Tensor, " tokens"]) -> None:
        """Add the neuron activations of some tokens that stand at `positions` of their sequences."""
        if not len(a):
            return
        into = ColumnSums(self.active, self.nonzero, self.total, self.total_abs, self.share_square, self.largest)
        squares, zeros = add_columns(a, down_norms, kept_count(ACTIVE_DENSITY, a.width), into)
        by_position = (self.position_square, self.position_zeros, self.position_tokens)
        add_positions(positions, squares, zeros, PositionSums(POSITION_EDGES, *by_position, self.seen))

    def add_up(self, u: Rows) -> None:
        """Add the up activations of some tokens."""
        add_squares(u, self.square_up)

    def merge(self, other: "NeuronSums") -> None:
        """Add what another accumulator saw."""
        for part in fields(self):
            mine = getattr(self, part.name)
            theirs = getattr(other, part.name).to(mine.device)
            setattr(self, part.name, torch.maximum(mine, theirs) if part.name == "largest" else mine + theirs)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "NeuronSums":
        """The accumulator whose `tensors()` these are."""
        return cls(**state)


@dataclass
class HeadSums:
    """Sums over tokens of the output norms of a layer's heads and KV groups; `seen` [1]: tokens.

    The output of head h is o_h W_o,h; a group's output is the sum of its heads' outputs.
    """

    seen: Int[Tensor, "1"]
    heads: Float[Tensor, " heads"]
    groups: Float[Tensor, " kv_heads"]

    @classmethod
    def zeros(cls, heads: int, kv_heads: int) -> "HeadSums":
        """Nothing seen yet."""
        sums = (torch.zeros(units, dtype=torch.float64) for units in (heads, kv_heads))
        return cls(torch.zeros(1, dtype=torch.int64), *sums)

    @property
    def tokens(self) -> int:
        return int(self.seen[0])

    def add(self, o: Rows, norms: HeadNorms) -> None:
        """Add the concatenated head outputs of some tokens."""
        self.seen += len(o)
        heads, groups = norms.summed(numbers(o))
        self.heads += heads
        self.groups += groups

    def merge(self, other: "HeadSums") -> None:
        """Add what another accumulator saw."""
        for part in fields(self):
            mine = getattr(self, part.name)
            mine += getattr(other, part.name).to(mine.device)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "HeadSums":
        """The accumulator whose `tensors()` these are."""
        return cls(**state)
