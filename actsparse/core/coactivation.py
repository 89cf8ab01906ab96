"""Which of the hottest neurons fire together: structure inside the hot set, from a bounded sample of tokens.

Our own definition [I]: a neuron fires at a token where |a| * ||w|| is among its layer's top 20 % (and not 0).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.masks import kept_count, row_threshold

HOTTEST = 64
CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CoActivation:
    """Of one layer: the ids of the neurons [k] that fire most, hottest first; at how many of the `tokens` sampled two
    of them fire together, `counts` [k, k] (on the diagonal: fire at all)."""

    neurons: Int[Tensor, " k"]
    counts: Int[Tensor, "k k"]
    tokens: int

    def phi(self) -> float | None:
        """The mean correlation (phi coefficient) of two different neurons' firing, -1..1; 0: independent, above: they
        fire together more than their rates explain. None where no pair of them varies."""
        together, n = self.counts.double(), max(1, self.tokens)
        rate = together.diagonal() / n
        spread = (rate * (1 - rate)).sqrt()
        room = spread[:, None] * spread[None, :]
        pairs = ~torch.eye(len(rate), dtype=torch.bool) & (room > 0)
        found = ((together / n - rate[:, None] * rate[None, :]) / room)[pairs]
        return float(found.mean()) if len(found) else None


def co_activation(
    a: Float[Tensor, "tokens neurons"],
    down_norms: Float[Tensor, " neurons"],
    firing: Int[Tensor, " neurons"],
    *,
    density: float,
    hottest: int = HOTTEST,
) -> CoActivation:
    """Counts over sampled activations; `firing` [neurons] says how often each neuron fired over all tokens."""
    width = a.shape[1]
    neurons = firing.cpu().argsort(descending=True, stable=True)[:hottest]
    chosen, norms = neurons.to(a.device), down_norms.to(a.device)
    counts = torch.zeros(len(neurons), len(neurons), dtype=torch.float64, device=a.device)
    for part in a.split(CHUNK):
        scores = part.float().nan_to_num(0.0, 0.0, 0.0).abs() * norms
        fires = (scores >= row_threshold(scores, kept_count(density, width))) & (scores > 0)
        among = fires[:, chosen].double()
        counts += among.T @ among
    return CoActivation(neurons=neurons, counts=counts.long().cpu(), tokens=len(a))
