"""What routers of mixtures of experts do: how spread their probabilities are, token by token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class RouterSums:
    """Sums over tokens of a router's entropy H(softmax(logits)), in nats: `sums` [2] of H and H^2, `seen` [1]."""

    sums: Float[Tensor, "2"]
    seen: Int[Tensor, "1"]

    @classmethod
    def zeros(cls) -> "RouterSums":
        """Nothing seen yet."""
        return cls(torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))

    @property
    def tokens(self) -> int:
        return int(self.seen)

    @property
    def entropy(self) -> float:
        """The mean entropy of a token: 0 when one expert takes all, ln(experts) when all are alike."""
        return float(self.sums[0]) / max(1, self.tokens)

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean over tokens; None under two tokens."""
        if self.tokens < 2:
            return None
        spread = float(self.sums[1]) / self.tokens - self.entropy**2
        return (max(0.0, spread) / (self.tokens - 1)) ** 0.5

    def add(self, logits: Float[Tensor, "tokens experts"]) -> None:
        """Add some tokens."""
        logs = logits.detach().double().log_softmax(dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        self.sums += torch.stack([entropy.sum(), entropy.square().sum()]).to(self.sums.device)
        self.seen += len(logits)

    def merge(self, other: "RouterSums") -> None:
        """Add what another accumulator saw."""
        self.sums += other.sums.to(self.sums.device)
        self.seen += other.seen.to(self.seen.device)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"sums": self.sums, "seen": self.seen}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "RouterSums":
        """The accumulator whose `tensors()` these are."""
        return cls(state["sums"], state["seen"])
