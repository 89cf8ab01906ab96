"""What routers of mixtures of experts do: how spread their probabilities are, token by token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class RouterSums:
    """Sums of a router's entropy H(softmax(logits)), in nats, for its mean over tokens and the error over sequences.

    `sums` [3]: of H over tokens; over sequences of S^2 and S * n, S being a sequence's sum of H and n its tokens.
    `seen` [3]: tokens; over sequences the sum of n^2; sequences.
    """

    sums: Float[Tensor, "3"]
    seen: Int[Tensor, "3"]

    @classmethod
    def zeros(cls) -> "RouterSums":
        """Nothing seen yet."""
        return cls(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))

    @property
    def tokens(self) -> int:
        return int(self.seen[0])

    @property
    def entropy(self) -> float:
        """The mean entropy of a token: 0 when one expert takes all, ln(experts) when all are alike."""
        return float(self.sums[0]) / max(1, self.tokens)

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean, linearised over whole sequences; None of fewer than two."""
        count = int(self.seen[2])
        if count < 2:
            return None
        squares, products = self.sums[1:].tolist()
        deviations = squares - 2 * self.entropy * products + self.entropy**2 * int(self.seen[1])
        return (max(0.0, deviations) * count / (count - 1)) ** 0.5 / self.tokens

    def add(self, logits: Float[Tensor, "tokens experts"], lengths: Int[Tensor, " sequences"]) -> None:
        """Add the tokens of some whole sequences, which have `lengths` tokens one after the other."""
        logs = logits.detach().double().log_softmax(dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1).cpu()
        sums = torch.stack([part.sum() for part in entropy.split(lengths.tolist())]) if len(lengths) else entropy[:0]
        self.sums += torch.stack([entropy.sum(), sums.square().sum(), (sums * lengths).sum()])
        self.seen += torch.tensor([len(entropy), int(lengths.square().sum()), len(lengths)])

    def merge(self, other: "RouterSums") -> None:
        """Add what another accumulator saw."""
        self.sums += other.sums
        self.seen += other.seen

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        return {"sums": self.sums, "seen": self.seen}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> "RouterSums":
        """The accumulator whose `tensors()` these are."""
        return cls(state["sums"], state["seen"])
