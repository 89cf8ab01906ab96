"""Training of small routers: which units of a layer a token will use (methods.md, section 3; arXiv 2310.17157).

A router is two linear layers, h -> rank -> units, without bias. Deja Vu's has no non-linearity between them, the
MLP router of MoE-fication a tanh. Training is seeded and runs in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from actsparse.core.masks import top_mask

BETAS = (0.9, 0.999)
Loss = Callable[[Float[Tensor, "tokens units"], Tensor], Tensor]


@dataclass(frozen=True)
class RouterWeights:
    """Two matrices; `tanh` says whether a tanh stands between them."""

    first: Float[Tensor, "rank hidden"]
    second: Float[Tensor, "units rank"]
    tanh: bool = False

    def logits(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens units"]:
        """The score of every unit, in float32."""
        inner = F.linear(x.float(), self.first.to(x.device, torch.float32))
        return F.linear(inner.tanh() if self.tanh else inner, self.second.to(x.device, torch.float32))

    @property
    def numel(self) -> int:
        """Weights that a token reads."""
        return self.first.numel() + self.second.numel()

    @classmethod
    def drawn(cls, hidden: int, rank: int, units: int, seed: int, *, tanh: bool = False) -> "RouterWeights":
        """Weights before training: uniform within 1/sqrt(inputs), as `nn.Linear` draws them, from one seed."""
        generator = torch.Generator().manual_seed(seed)
        first = (2 * torch.rand(rank, hidden, generator=generator) - 1) / sqrt(hidden)
        second = (2 * torch.rand(units, rank, generator=generator) - 1) / sqrt(rank)
        return cls(first, second, tanh)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast: at most `epochs` passes in batches of `batch` tokens, AdamW at `rate` with weight `decay`;
    training ends when the held-out recall has not risen for `patience` epochs."""

    epochs: int = 20
    batch: int = 64
    rate: float = 1e-4
    decay: float = 0.01
    patience: int = 2
    seed: int = 0

    def steps(self, tokens: int) -> int:
        """Batches of one epoch."""
        return ceil(tokens / self.batch)


@dataclass(frozen=True)
class Examples:
    """What a router learns from, and what it is judged by on other tokens.

    x, held_x: inputs [tokens, hidden]. target: what the loss compares logits with [tokens, units]. held_labels: the
    units that held-out tokens use. `kept`: units that the router's mask will keep.
    """

    x: Float[Tensor, "tokens hidden"]
    target: Tensor
    held_x: Float[Tensor, "held hidden"]
    held_labels: Bool[Tensor, "held units"]
    kept: int


@dataclass(frozen=True)
class Trained:
    """The weights of the best epoch, counting from 1 (0: the drawn ones), its held-out recall, and that of every
    epoch."""

    weights: RouterWeights
    recall: float
    epoch: int
    recalls: tuple[float, ...]


class DivergedError(ValueError):
    """A loss, an input or a weight that is no finite number; the message says in which epoch."""


def weighted_bce(logits: Float[Tensor, "tokens units"], labels: Bool[Tensor, "tokens units"]) -> Tensor:
    """Mean binary cross-entropy in which a unit that is not used weighs p + 0.005, p being the share of used ones.

    The weights of Deja Vu's public code: used and unused units count about alike, however rare use is.
    """
    truth = labels.to(logits.dtype)
    unused = truth.mean() + 0.005
    return F.binary_cross_entropy_with_logits(logits, truth, weight=truth * (1 - unused) + unused)


def soft_bce(logits: Float[Tensor, "tokens units"], target: Float[Tensor, "tokens units"]) -> Tensor:
    """Mean binary cross-entropy against scores scaled to the largest of each token (all zero stays zero)."""
    largest = target.amax(dim=-1, keepdim=True)
    return F.binary_cross_entropy_with_logits(logits, torch.where(largest > 0, target / largest, 0.0))


def recall_at(
    scores: Float[Tensor, "tokens units"], labels: Bool[Tensor, "tokens units"], kept: int
) -> Float[Tensor, " used"]:
    """|top `kept` by score and labelled| / min(kept, |labelled|) of every token that has a label, in float64."""
    hits = (top_mask(scores, kept) & labels).sum(dim=-1).double()
    possible = labels.sum(dim=-1).clamp(max=kept)
    return hits[possible > 0] / possible[possible > 0]


def corrected(recall: float, kept: int, units: int) -> float:
    """(recall - k/f) / (1 - k/f): 0 is chance, 1 is perfect; 1 where everything is kept."""
    chance = kept / units
    return 1.0 if chance >= 1 else (recall - chance) / (1 - chance)


def train(
    start: RouterWeights, examples: Examples, loss: Loss, schedule: Schedule, advance: Callable[[int], None]
) -> Trained:
    """Train from `start`; `advance(1)` after every batch (and for batches that an early stop leaves out).

    Raises DivergedError where a loss or a weight is not finite.
    """
    _check_finite(examples)
    first, second = (part.detach().clone().requires_grad_(True) for part in (start.first, start.second))
    optimiser = torch.optim.AdamW(
        [first, second], lr=schedule.rate, betas=BETAS, weight_decay=schedule.decay, fused=True
    )
    generator = torch.Generator().manual_seed(schedule.seed)
    best = Trained(start, _held_recall(start, examples), 0, ())
    recalls: list[float] = []
    steps = schedule.steps(len(examples.x))
    for epoch in range(1, schedule.epochs + 1):
        order = torch.randperm(len(examples.x), generator=generator)
        for chosen in order.split(schedule.batch):
            logits = RouterWeights(first, second, start.tanh).logits(examples.x[chosen])
            value = loss(logits, examples.target[chosen])
            if not bool(value.isfinite()):
                raise DivergedError(f"the loss became {float(value.detach())} in epoch {epoch}")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            advance(1)
        now = RouterWeights(first.detach().clone(), second.detach().clone(), start.tanh)
        if not bool(now.first.isfinite().all() and now.second.isfinite().all()):
            raise DivergedError(f"a weight became infinite or no number in epoch {epoch}")
        recalls.append(_held_recall(now, examples))
        if recalls[-1] > best.recall:
            best = Trained(now, recalls[-1], epoch, ())
        elif epoch - best.epoch >= schedule.patience:
            advance(steps * (schedule.epochs - epoch))
            break
    return Trained(best.weights, best.recall, best.epoch, tuple(recalls))


def _held_recall(weights: RouterWeights, examples: Examples) -> float:
    with torch.no_grad():
        found = recall_at(weights.logits(examples.held_x), examples.held_labels, examples.kept)
    return float(found.mean()) if len(found) else 0.0


def _check_finite(examples: Examples) -> None:
    for name, values in (
        ("an input", examples.x),
        ("a held-out input", examples.held_x),
        ("a target", examples.target),
    ):
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise DivergedError(f"{name} is infinite or no number before training")
