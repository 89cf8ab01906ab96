"""Sparsity token by token: the share of neurons under a CETT threshold, its spread over tokens, and where tokens stand.

The set is that of CETT (methods.md, section 2); its spread and its split by position are ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BAND = (0.1, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSparsity:
    """The mean share over the `tokens` at positions `start` to `stop` - 1."""

    start: int
    stop: int
    share: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpread:
    """Sparsity over tokens: the band that holds the middle 80 % of them, and the means by position."""

    low: float
    high: float
    tokens: int
    by_position: tuple[PositionSparsity, ...]


def token_sparsity(
    a: Float[Tensor, "tokens neurons"], norms: Float[Tensor, " neurons"], eps: float
) -> Float[Tensor, " tokens"]:
    """The share of neurons with |a|*||w|| < eps at every token, in float64 on the CPU."""
    small = a.abs().float() * norms.to(a.device) < eps
    return small.count_nonzero(dim=1).double().cpu() / a.shape[1]


def spread_over_tokens(
    shares: Float[Tensor, " tokens"], positions: Int[Tensor, " tokens"], edges: tuple[int, ...]
) -> TokenSpread:
    """The band over at least one token, and the means by ranges of positions [edges[i], edges[i + 1])."""
    low, high = shares.quantile(torch.tensor(BAND, dtype=shares.dtype)).tolist()
    bins = torch.bucketize(positions, torch.tensor(edges), right=True) - 1
    found = []
    for index in bins.unique().tolist():
        mine = shares[bins == index]
        stop = edges[index + 1] if index + 1 < len(edges) else 2 * edges[index]
        mean = float(mine.mean())
        found.append(PositionSparsity(start=edges[index], stop=stop, share=mean, tokens=len(mine)))
    return TokenSpread(low=low, high=high, tokens=len(shares), by_position=tuple(found))
