"""Statistics that are fed sequence by sequence, merge, and never grow with the number of tokens.

Sums are taken in float32 within one sequence and in float64 across sequences; so they do not depend on how sequences
were batched, and `merge(profile(a), profile(b))` equals `profile(a + b)`.
"""

from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.masks import kept_count, row_threshold
from actsparse.core.quantiles import LogHistogram

ACTIVE_DENSITY = 0.2
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass
class Moments:
    """Count, sums and extreme of every entry of one kind in one layer, with its histogram of magnitudes."""

    count: int = 0
    total: float = 0.0
    total_abs: float = 0.0
    total_square: float = 0.0
    largest: float = 0.0
    not_finite: int = 0
    histogram: LogHistogram = field(default_factory=LogHistogram)

    def add(self, x: Float[Tensor, "tokens width"]) -> None:
        """Add the activations of one sequence; entries that are NaN or infinite are counted apart, as zeros."""
        x = x.detach().float()
        total = x.sum(dim=1).double().sum()
        if not torch.isfinite(total):
            bad = ~torch.isfinite(x)
            self.not_finite += int(bad.sum())
            x = x.masked_fill(bad, 0.0)
            total = x.sum(dim=1).double().sum()
        magnitude = x.abs()
        self.count += x.numel()
        self.total += float(total)
        self.total_abs += float(magnitude.sum(dim=1).double().sum())
        self.total_square += float(torch.linalg.vecdot(x, x).double().sum())
        self.largest = max(self.largest, float(magnitude.max()) if x.numel() else 0.0)
        self.histogram.add(x)

    def merge(self, other: "Moments") -> None:
        """Add what another accumulator saw."""
        self.count += other.count
        self.total += other.total
        self.total_abs += other.total_abs
        self.total_square += other.total_square
        self.largest = max(self.largest, other.largest)
        self.not_finite += other.not_finite
        self.histogram.merge(other.histogram)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        sums = torch.tensor([self.total, self.total_abs, self.total_square, self.largest], dtype=torch.float64)
        return {"sums": sums, "seen": torch.tensor([self.count, self.not_finite]), **self.histogram.tensors()}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "Moments":
        """The accumulator whose `tensors()` these are."""
        total, total_abs, total_square, largest = state["sums"].tolist()
        count, not_finite = (int(value) for value in state["seen"])
        histogram = LogHistogram.of_tensors(state)
        return cls(count, total, total_abs, total_square, largest, not_finite, histogram)


@dataclass
class NeuronSums:
    """Sums over tokens for every neuron of a layer; `tokens` positions seen, `rows` of them with ||a|| > 0.

    active: tokens in which |a|*||w|| is among the layer's top 20 % (and not 0); nonzero: a != 0; share_square:
    sum of (a / ||a||)^2 (GRIFFIN's statistic, squared and not yet averaged); square_up: sum of u^2.
    """

    tokens: int
    rows: int
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
        return cls(0, 0, position_square=square, **counts, **sums, **positions)

    def add(
        self, a: Float[Tensor, "tokens neurons"], down_norms: Float[Tensor, " neurons"], first_position: int
    ) -> None:
        """Add the neuron activations of one sequence, whose first row stands at `first_position`."""
        if not len(a):
            return
        a = a.detach().float().nan_to_num(0.0, 0.0, 0.0)
        magnitude = a.abs()
        scores = magnitude * down_norms
        firing = (scores >= row_threshold(scores, kept_count(ACTIVE_DENSITY, a.shape[1]))) & (scores > 0)
        squares = a.square()
        row_squares = squares.sum(dim=1)
        inverse = torch.where(row_squares > 0, 1.0 / row_squares, torch.zeros_like(row_squares))
        nonzero = a != 0
        self.tokens += a.shape[0]
        self.rows += int((row_squares > 0).sum())
        self.active += firing.sum(dim=0).cpu()
        self.nonzero += nonzero.sum(dim=0).cpu()
        self.total += a.sum(dim=0).double().cpu()
        self.total_abs += magnitude.sum(dim=0).double().cpu()
        self.largest = torch.maximum(self.largest, magnitude.amax(dim=0).double().cpu())
        self.share_square += (inverse @ squares).double().cpu()
        self._add_positions(row_squares, (~nonzero).sum(dim=1), first_position)

    def add_up(self, u: Float[Tensor, "tokens neurons"]) -> None:
        """Add the up activations of one sequence."""
        self.square_up += u.detach().float().square().sum(dim=0).double().cpu()

    def _add_positions(self, row_squares: Tensor, row_zeros: Tensor, first_position: int) -> None:
        positions = torch.arange(first_position, first_position + len(row_squares))
        bins = torch.bucketize(positions, torch.tensor(POSITION_EDGES), right=True) - 1
        self.position_square.index_add_(0, bins, row_squares.double().cpu())
        self.position_zeros.index_add_(0, bins, row_zeros.cpu())
        self.position_tokens.index_add_(0, bins, torch.ones_like(bins))

    def merge(self, other: "NeuronSums") -> None:
        """Add what another accumulator saw."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            setattr(self, part.name, torch.maximum(mine, theirs) if part.name == "largest" else mine + theirs)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {part.name: torch.as_tensor(getattr(self, part.name)) for part in fields(self)}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "NeuronSums":
        """The accumulator whose `tensors()` these are."""
        sums = {name: tensor for name, tensor in state.items() if name not in ("tokens", "rows")}
        return cls(int(state["tokens"]), int(state["rows"]), **sums)


@dataclass
class HeadSums:
    """Sums over tokens of the output norms of a layer's heads and KV groups.

    The output of head h is o_h W_o,h; a group's output is the sum of its heads' outputs.
    """

    tokens: int
    heads: Float[Tensor, " heads"]
    groups: Float[Tensor, " kv_heads"]

    @classmethod
    def zeros(cls, heads: int, kv_heads: int) -> "HeadSums":
        """Nothing seen yet."""
        return cls(0, torch.zeros(heads, dtype=torch.float64), torch.zeros(kv_heads, dtype=torch.float64))

    def add(self, o: Float[Tensor, "tokens width"], grams: "HeadGrams") -> None:
        """Add the concatenated head outputs of one sequence."""
        o = o.detach().float()
        self.tokens += o.shape[0]
        self.heads += output_norms(o, grams.heads).sum(dim=0).double().cpu()
        self.groups += output_norms(o, grams.groups).sum(dim=0).double().cpu()

    def merge(self, other: "HeadSums") -> None:
        """Add what another accumulator saw."""
        self.tokens += other.tokens
        self.heads = self.heads + other.heads
        self.groups = self.groups + other.groups

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"tokens": torch.tensor(self.tokens), "heads": self.heads, "groups": self.groups}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "HeadSums":
        """The accumulator whose `tensors()` these are."""
        return cls(int(state["tokens"]), state["heads"], state["groups"])


@dataclass(frozen=True)
class HeadGrams:
    """W_h^T W_h of the output projection's slice of each head, and of each KV group, so that norms need no product
    with the hidden size: ||W_h o||^2 = o^T (W_h^T W_h) o.

    heads: [heads, head_dim, head_dim]; groups: [kv_heads, heads/kv_heads * head_dim, the same].
    """

    heads: Float[Tensor, "heads head_dim head_dim"]
    groups: Float[Tensor, "kv_heads group_width group_width"]

    @classmethod
    def of(cls, weight: Float[Tensor, "hidden width"], heads: int, kv_heads: int) -> "HeadGrams":
        """The Gram matrices of an output projection [hidden, heads * head_dim]."""
        return cls(_grams(weight, heads), _grams(weight, kv_heads))


def output_norms(
    o: Float[Tensor, "tokens width"], grams: Float[Tensor, "units part part"]
) -> Float[Tensor, "tokens units"]:
    """||W_h o_h|| of each unit (head or group) at each token."""
    parts = o.view(o.shape[0], grams.shape[0], -1)
    return torch.einsum("thi,hij,thj->th", parts, grams, parts).clamp_min(0).sqrt()


def _grams(weight: Tensor, units: int) -> Tensor:
    slices = weight.float().view(weight.shape[0], units, -1)
    return torch.einsum("dhi,dhj->hij", slices, slices)
