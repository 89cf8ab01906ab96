"""Sampling on the device: one uniform number a token, drawn before the decode, decides by inverse distribution.

So a seed gives the same text on every device up to rounding, and a captured step needs no random state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.errors import PlanError

STOP_EVERY = 8  # tokens between two looks at what was generated: a look waits for the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Draw from softmax(logits / temperature), cut to the fewest tokens that hold `top_p` of it."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise PlanError(f"a temperature of {self.temperature} cannot be sampled at", "decode greedily instead")
        if not 0 < self.top_p <= 1:
            raise PlanError(
                f"top_p is {self.top_p}, and a share of probability is above 0 and at most 1",
                "write for example top_p=0.9",
            )

    def uniform(self, batch: int, length: int) -> Tensor:
        """[batch, length] numbers in [0, 1), the same for a seed whatever the device."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(batch, length, generator=generator)


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """[batch] tokens; logits [batch, vocab], uniform [batch], temperature and top_p [1]."""
    share, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    below = share.cumsum(-1) - share
    kept = below < top_p  # the first is always kept
    mass = (share * kept).sum(-1, keepdim=True)
    place = (kept & (below <= uniform[:, None] * mass)).sum(-1, keepdim=True) - 1
    return order.gather(-1, place.clamp(min=0))[:, 0]


def cut(tokens: list[int], stop: frozenset[int]) -> list[int]:
    """Tokens up to the first stop token, itself among them."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
