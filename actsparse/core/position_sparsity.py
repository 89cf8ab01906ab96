"""Sparsity against token position: the share of neurons under a CETT threshold, by where a token stands."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSparsity:
    """The share of neurons with |a|*||w|| < eps over the `tokens` at positions `start` to `stop` - 1."""

    start: int
    stop: int
    share: float
    tokens: int


def sparsity_by_position(
    a: Float[Tensor, "tokens neurons"],
    norms: Float[Tensor, " neurons"],
    positions: Int[Tensor, " tokens"],
    eps: float,
    edges: tuple[int, ...],
) -> tuple[PositionSparsity, ...]:
    """The share by ranges of positions [edges[i], edges[i + 1]); ranges without a token are left out.

    The set is that of CETT (methods.md, section 2); its split by position is ours.
    """
    dropped = (a.abs().float() * norms.to(a.device) < eps).double().mean(dim=1).cpu()
    bins = torch.bucketize(positions, torch.tensor(edges), right=True) - 1
    found = []
    for index in bins.unique().tolist():
        mine = dropped[bins == index]
        stop = edges[index + 1] if index + 1 < len(edges) else 2 * edges[index]
        share = float(mine.mean())
        found.append(PositionSparsity(start=edges[index], stop=stop, share=share, tokens=len(mine)))
    return tuple(found)
