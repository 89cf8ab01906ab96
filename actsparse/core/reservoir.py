"""A bounded sample of token positions that does not depend on their order and merges: the k smallest hashes."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def position_keys(digest: int, positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A uniform 64-bit hash of (seed, sequence digest, position) for each position (splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.uint64((digest ^ (seed * 0x9E3779B97F4A7C15)) % 2**64)
        z = state + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return z ^ (z >> np.uint64(31))


def capacity(tokens: int, megabytes: int, layers: int, width: int, element_size: int) -> int:
    """How many token positions fit: at most `tokens`, and at most `megabytes` over all layers; at least 1."""
    return max(1, min(tokens, megabytes * 2**20 // max(1, layers * width * element_size)))


@dataclass
class Reservoir:
    """Activations [slots, width] of each layer at the token positions with the smallest keys.

    `keys` [slots] (2^64 - 1: empty); `positions` [slots]: where in its sequence each stood, and `sequences` [slots]
    the digest of that sequence. Buffers are allocated once,
    at full size; each moves once, to the device that its layer's activations come from.
    """

    keys: NDArray[np.uint64]
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]
    layers: dict[int, Float[Tensor, "slots width"]] = field(default_factory=dict)

    @classmethod
    def empty(cls, slots: int, layers: tuple[int, ...], width: int, dtype: torch.dtype) -> "Reservoir":
        """Nothing kept yet."""
        buffers = {layer: torch.zeros(slots, width, dtype=dtype) for layer in layers}
        positions, sequences = (np.zeros(slots, dtype=np.int64) for _ in range(2))
        return cls(np.full(slots, np.iinfo(np.uint64).max), positions, sequences, buffers)

    @property
    def used(self) -> int:
        return int((self.keys != np.iinfo(np.uint64).max).sum())

    def admit(
        self, keys: NDArray[np.uint64], positions: NDArray[np.int64], sequences: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Decide which of the new positions enter: (their places, the slots that they take), both int64.

        What the slots say of their tokens changes at once; the caller then writes the activations of every layer with
        `put`.
        """
        everything = np.concatenate([self.keys, keys])
        kept = np.argsort(everything, kind="stable")[: len(self.keys)]
        entering = np.sort(kept[kept >= len(self.keys)]) - len(self.keys)
        leaving = np.setdiff1d(np.arange(len(self.keys)), kept[kept < len(self.keys)], assume_unique=True)
        entering = entering[keys[entering] != np.iinfo(np.uint64).max]
        slots = leaving[: len(entering)]
        self.keys[slots] = keys[entering]
        self.positions[slots] = positions[entering]
        self.sequences[slots] = sequences[entering]
        return torch.from_numpy(entering), torch.from_numpy(slots)

    def put(self, layer: int, slots: Tensor, rows: Float[Tensor, "new width"]) -> None:
        """Write the activations of admitted positions of one layer."""
        if len(slots):
            buffer = self.layers[layer] = self.layers[layer].to(rows.device)
            buffer[slots.to(rows.device)] = rows.detach().to(buffer.dtype)

    def rows(self, layer: int) -> Float[Tensor, "used width"]:
        """The kept activations of a layer, in the order of their keys."""
        buffer = self.layers[layer]
        return buffer[self._order.to(buffer.device)]

    @property
    def places(self) -> Int[Tensor, " used"]:
        """Where in their sequences the kept positions stood, in the order of their keys."""
        return torch.from_numpy(self.positions)[self._order]

    @property
    def texts(self) -> Int[Tensor, " used"]:
        """Digests of the sequences that the kept positions stood in, in the order of their keys."""
        return torch.from_numpy(self.sequences)[self._order]

    @property
    def _order(self) -> Tensor:
        return torch.from_numpy(np.argsort(self.keys, kind="stable")[: self.used])

    def merge(self, other: "Reservoir") -> None:
        """Keep the smallest keys of both."""
        places, slots = self.admit(other.keys, other.positions, other.sequences)
        for layer in self.layers:
            theirs = other.layers[layer]
            self.put(layer, slots, theirs[places.to(theirs.device)].to(self.layers[layer].device))

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a shard."""
        buffers = {f"layer{layer}": rows for layer, rows in self.layers.items()}
        kept = {"keys": self.keys.view(np.int64), "positions": self.positions, "sequences": self.sequences}
        return {name: torch.from_numpy(numbers.copy()) for name, numbers in kept.items()} | buffers

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the state whose `tensors()` these are."""
        self.keys = state["keys"].numpy().view(np.uint64).copy()
        self.positions = state["positions"].numpy().copy()
        self.sequences = state["sequences"].numpy().copy()
        for layer, buffer in self.layers.items():
            buffer.copy_(state[f"layer{layer}"])
