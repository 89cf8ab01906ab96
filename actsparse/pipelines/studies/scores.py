"""What plans got over blocks, and intervals of it by bootstrap over blocks."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import exp

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.bootstrap import Interval, bootstrap_mean, bootstrap_ratio


@dataclass(frozen=True)
class Scored:
    """One plan over every block; a control of several seeds is their mean. nll and kl in nats, `kept` is the share of
    neurons (or of the plan's own units) kept in each layer, `unread` the share of the model's bytes that a decode step
    does not read."""

    nll: Float[Tensor, "blocks tokens"]
    kl: Float[Tensor, "blocks tokens"]
    top1: Float[Tensor, "blocks tokens"]
    kept: Float[Tensor, "blocks layers"]
    unread: Float[Tensor, "blocks"]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.nll.numel()

    def part(self, tokens: slice) -> "Scored":
        """The same over some of the scored tokens of each block."""
        return replace(self, nll=self.nll[:, tokens], kl=self.kl[:, tokens], top1=self.top1[:, tokens])


FIELDS = tuple(one.name for one in fields(Scored))


def of_blocks(scored: Scored, blocks: slice) -> Scored:
    """The same over some of the blocks."""
    return Scored(*(getattr(scored, name)[blocks] for name in FIELDS))


def mean_of(scored: list[Scored]) -> Scored:
    """The mean over replicas, token by token."""
    return Scored(*(torch.stack([getattr(one, name) for one in scored]).mean(dim=0) for name in FIELDS))


def token_mean(values: Float[Tensor, "blocks tokens"], seed: int = 0) -> Interval:
    """The mean over tokens, with its interval over blocks."""
    counts = torch.full((len(values),), values.shape[1], dtype=torch.float64)
    return bootstrap_ratio(values.double().sum(dim=1), counts, seed=seed)


def difference(mine: Scored, other: Scored, seed: int = 0) -> Interval:
    """The paired difference in mean NLL (mine less other), over the same tokens."""
    return token_mean(mine.nll - other.nll, seed)


def perplexity(scored: Scored, seed: int = 0) -> Interval:
    """exp of the mean NLL and of the ends of its interval."""
    return mapped(token_mean(scored.nll, seed), lambda nll: exp(min(nll, 700.0)))


def relative_quality(mine: Scored, dense: Scored, seed: int = 0) -> Interval:
    """Dense perplexity over a plan's, paired: 1 is lossless."""
    return mapped(difference(mine, dense, seed), lambda delta: exp(-min(max(delta, -700.0), 700.0)))


def drop_mean(scored: Scored, seed: int = 0) -> Interval:
    """The share dropped, mean over layers, with its interval over blocks."""
    return bootstrap_mean(1 - scored.kept.double().mean(dim=1), seed=seed)


def unread_mean(scored: Scored) -> float:
    """The share of the model's bytes that a decode step does not read, mean over blocks."""
    return float(scored.unread.double().mean())


def mapped(found: Interval, function: Callable[[float], float]) -> Interval:
    """A monotonic function of a statistic; its standard error to first order is left out."""
    ends = [None if end is None else function(end) for end in (found.low, found.high)]
    low, high = sorted(ends, key=lambda end: (end is None, end)) if None not in ends else ends
    value = None if found.value is None else function(found.value)
    return Interval(value=value, low=low, high=high, n=found.n, stderr=None)


def ratio(above: Float[Tensor, " blocks"], below: Float[Tensor, " blocks"], seed: int = 0) -> Interval:
    """sum(above) / sum(below) over blocks, resampled together."""
    return bootstrap_ratio(above.double(), below.double(), seed=seed)
