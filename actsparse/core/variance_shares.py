"""SI3: what a neuron's activation depends on, as shares of variance (methods.md section 6).

y = log(1e-4 + |a_i| / ||a||) is fitted per neuron by least squares on indicators that enter one after the other:

    neuron -> sequence x neuron -> token type x neuron -> position bin x neuron -> residual

and each gets the sum of squares that it adds (sequential, or type I). A large `sequence` share is inertia, a large
`token_type` share says that the token decides; `neuron` is the static hot set. Since the factors are not orthogonal,
an earlier one takes what it shares with a later one. Our definition [I].

The state is a few matrices of size (levels x neurons), which merge by addition; activations are never kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

OFFSET = 1e-4
MIN_COUNT = 8
POSITION_BINS = 8
# Eigenvalues of the (integer) Gram matrix below this share of the largest belong to dependent indicators.
RANK_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorLevels:
    """The level of each factor at each token; `token_type` is -1 for rare types, which share one level."""

    sequence: Int[Tensor, " tokens"]
    token_type: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    sequences: int
    types: int
    position_bins: int

    def rows(self, start: int, stop: int) -> "FactorLevels":
        """The levels of tokens start .. stop-1, for one batch."""
        return FactorLevels(
            sequence=self.sequence[start:stop],
            token_type=self.token_type[start:stop],
            position=self.position[start:stop],
            sequences=self.sequences,
            types=self.types,
            position_bins=self.position_bins,
        )


def factor_levels(
    tokens: Int[Tensor, "sequences positions"], *, min_count: int = MIN_COUNT, position_bins: int = POSITION_BINS
) -> FactorLevels:
    """The levels of all tokens of some sequences, row after row, from token ids alone.

    Sink positions have been dropped. Types with fewer than `min_count` occurrences share one level; positions are cut
    into equal bins.
    """
    sequences, positions = tokens.shape
    ids, inverse, counts = tokens.cpu().unique(return_inverse=True, return_counts=True)
    frequent = counts >= min_count
    renumbered = torch.where(frequent, frequent.cumsum(0) - 1, torch.full_like(ids, -1))
    place = torch.arange(positions) * position_bins // positions
    return FactorLevels(
        sequence=torch.arange(sequences).repeat_interleave(positions),
        token_type=renumbered[inverse].flatten(),
        position=place.repeat(sequences),
        sequences=sequences,
        types=int(frequent.sum()),
        position_bins=position_bins,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceSums:
    """Sufficient statistics of one layer: X'X, X'Y and the sum of Y^2, float64; columns of X are 1 and the indicators.

    `factors` are the numbers of columns of sequence, token type and position bin.
    """

    gram: Float[Tensor, "columns columns"]
    cross: Float[Tensor, "columns neurons"]
    square: float
    factors: tuple[int, int, int]

    def merge(self, other: "VarianceSums") -> "VarianceSums":
        """The sums over both parts, which must have numbered their levels alike."""
        if self.factors != other.factors:
            raise ValueError(f"levels differ: {self.factors} and {other.factors}")
        return VarianceSums(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            square=self.square + other.square,
            factors=self.factors,
        )


def variance_sums(activations: Float[Tensor, "tokens neurons"], levels: FactorLevels) -> VarianceSums:
    """The sums of one layer over a batch of tokens; rows that are zero or not finite are skipped."""
    device = activations.device
    norms = activations.double().norm(dim=-1)
    usable = (norms.isfinite() & (norms > 0)).nonzero().flatten()
    y = (activations[usable].double().abs() / norms[usable, None] + OFFSET).log()
    factors = (levels.sequences, levels.types, levels.position_bins)
    starts = (1, 1 + levels.sequences, 1 + levels.sequences + levels.types)
    indicators = torch.zeros(len(usable), 1 + sum(factors), dtype=torch.float64, device=device)
    indicators[:, 0] = 1
    for start, level in zip(starts, (levels.sequence, levels.token_type, levels.position), strict=True):
        level = level.to(device)[usable]
        known = (level >= 0).nonzero().flatten()
        indicators[known, start + level[known]] = 1
    # products, since `index_add_` on a GPU adds in an order that changes from run to run
    gram, cross = indicators.mT @ indicators, indicators.mT @ y
    return VarianceSums(gram=gram.cpu(), cross=cross.cpu(), square=float(y.square().sum()), factors=factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceShare:
    """A factor's share of the total sum of squares, 0..1; None where nothing varies.

    `squares` is its sum of squares by sequence; that of one sequence may be negative. `chance` is the share that its
    `degrees` of freedom per neuron would take if it had no effect (None for the neuron and the residual, and where no
    residual degrees are left).
    """

    share: float | None
    squares: Float[Tensor, " sequences"]
    chance: float | None
    degrees: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceShares:
    """SI3 of one layer; the five shares add up to 1. `degrees` of `neuron` counts the mean of each neuron.

    `squares` are the sums of squares around the mean by sequence, which the factors' add up to.
    """

    neuron: VarianceShare
    sequence: VarianceShare
    token_type: VarianceShare
    position: VarianceShare
    residual: VarianceShare
    squares: Float[Tensor, " sequences"]
    tokens: int


def variance_shares(*sequences: VarianceSums) -> VarianceShares:
    """Sequential sums of squares as shares of sum (y - mean y)^2 over all tokens and neurons of the sequences.

    With P_k the projection on the indicators of the first k factors, SS_k = ||P_k y||^2 - ||P_(k-1) y||^2, and the
    residual is ||y||^2 - ||P y||^2. A fit of all being the best, what it explains of one sequence is, to first order,
    what the sequence adds to SS_k: so `squares` give an interval over sequences without a fit for every resample.
    """
    sums = reduce(VarianceSums.merge, sequences)
    tokens, neurons = int(sums.gram[0, 0]), sums.cross.shape[1]
    mean = float(sums.cross[0].sum()) / max(1, tokens * neurons)
    levels = [_explained(sequences, torch.full((1, neurons), mean, dtype=torch.float64))]
    ranks: list[int] = []
    for end in torch.tensor([1, *sums.factors]).cumsum(0).tolist():
        solution, rank = _solution(sums, end)
        levels.append(_explained(sequences, solution))
        ranks.append(rank)
    levels.append(torch.tensor([one.square for one in sequences], dtype=torch.float64))
    squares = levels[-1] - levels[0]
    parts = [later - earlier for earlier, later in pairwise(levels)]
    degrees = [ranks[0], *(later - earlier for earlier, later in pairwise(ranks)), tokens - ranks[-1]]
    total = float(squares.sum())
    varies = total > RANK_TOLERANCE * max(sums.square, 1.0)
    noise = max(0.0, float(parts[4].sum())) / degrees[4] / total if degrees[4] > 0 and varies else None

    def share(part: int, *, by_chance: bool) -> VarianceShare:
        return VarianceShare(
            share=max(0.0, float(parts[part].sum())) / total if varies else None,
            squares=parts[part],
            chance=noise * degrees[part] if by_chance and noise is not None else None,
            degrees=degrees[part],
        )

    return VarianceShares(
        neuron=share(0, by_chance=False),
        sequence=share(1, by_chance=True),
        token_type=share(2, by_chance=True),
        position=share(3, by_chance=True),
        residual=share(4, by_chance=False),
        squares=squares,
        tokens=tokens,
    )


def pooled_shares(experts: Iterable[Sequence[VarianceSums]]) -> VarianceShares:
    """SI3 of a mixture of experts: every expert fitted over its own tokens, and the squares added up.

    Each expert comes as the sums of every sequence. One that serves no more tokens than there are levels would be
    explained by anything, and is left out; shares are None where all are. Our definition [I].
    """
    found: list[VarianceShares] = []
    sequences = 0
    for sums in experts:
        sequences = len(sums)
        if sum(float(one.gram[0, 0]) for one in sums) > len(sums[0].gram):
            found.append(variance_shares(*sums))
    zeros = torch.zeros(sequences, dtype=torch.float64)
    squares = sum((one.squares for one in found), start=zeros)
    total = float(squares.sum())

    def pooled(parts: list[VarianceShare]) -> VarianceShare:
        of_factor = sum((part.squares for part in parts), start=zeros)
        by_chance = [
            part.chance * float(one.squares.sum())
            for part, one in zip(parts, found, strict=True)
            if part.chance is not None
        ]
        return VarianceShare(
            share=max(0.0, float(of_factor.sum())) / total if total > 0 else None,
            squares=of_factor,
            chance=sum(by_chance) / total if by_chance and total > 0 else None,
            degrees=sum(part.degrees for part in parts),
        )

    return VarianceShares(
        neuron=pooled([one.neuron for one in found]),
        sequence=pooled([one.sequence for one in found]),
        token_type=pooled([one.token_type for one in found]),
        position=pooled([one.position for one in found]),
        residual=pooled([one.residual for one in found]),
        squares=squares,
        tokens=sum(one.tokens for one in found),
    )


def _solution(sums: VarianceSums, columns: int) -> tuple[Float[Tensor, "columns neurons"], int]:
    """The least-squares coefficients of the first `columns` columns of X for all neurons, and their rank."""
    values, vectors = torch.linalg.eigh(sums.gram[:columns, :columns])
    independent = values > RANK_TOLERANCE * values[-1]
    vectors = vectors[:, independent]
    return vectors @ ((vectors.mT @ sums.cross[:columns]) / values[independent, None]), int(independent.sum())


def _explained(sequences: Sequence[VarianceSums], solution: Tensor) -> Float[Tensor, " sequences"]:
    """||y||^2 - ||y - X b||^2 of every sequence, with X the first columns that the coefficients b are for."""
    columns = len(solution)
    products = solution @ solution.mT
    return torch.stack(
        [
            2 * (solution * one.cross[:columns]).sum() - (products * one.gram[:columns, :columns]).sum()
            for one in sequences
        ]
    )
