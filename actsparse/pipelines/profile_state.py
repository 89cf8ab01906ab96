"""What a recording has seen so far: it merges, is written as a shard, and is taken up again from one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.core.reservoir import Reservoir
from actsparse.core.streaming import HeadSums, Moments, NeuronSums, moved
from actsparse.models.load import LoadedModel
from actsparse.results import Site, SiteKind

MOMENT_KINDS = (
    SiteKind.ATTN_IN,
    SiteKind.ATTN_OUT,
    SiteKind.MLP_IN,
    SiteKind.GATE,
    SiteKind.UP,
    SiteKind.NEURON,
)


@dataclass
class ProfileState:
    """Everything recorded so far: O(layers x neurons), whatever the number of tokens. States merge.

    `done`: the places of the sequences that are in it, in the order in which they were recorded.
    """

    layers: tuple[int, ...]
    moments: dict[Site, Moments]
    neurons: dict[int, NeuronSums]
    heads: dict[int, HeadSums]
    reservoir: Reservoir
    done: list[int]
    tokens: int = 0

    @classmethod
    def empty(
        cls, loaded: LoadedModel, layers: tuple[int, ...], slots: int, kinds: tuple[SiteKind, ...] = MOMENT_KINDS
    ) -> "ProfileState":
        """Nothing recorded yet; `slots` token positions of room for the sample."""
        shape = loaded.record
        kinds = tuple(kind for kind in kinds if shape.gated or kind is not SiteKind.UP)
        return cls(
            layers=layers,
            moments={Site(layer=layer, kind=kind): Moments() for layer in layers for kind in kinds},
            neurons={layer: NeuronSums.zeros(shape.intermediate_size) for layer in layers},
            heads={layer: HeadSums.zeros(shape.heads, shape.kv_heads) for layer in layers},
            reservoir=Reservoir.empty(slots, layers, shape.intermediate_size, loaded.model.dtype),
            done=[],
        )

    @property
    def sequences(self) -> int:
        return len(self.done)

    def finished(self, places: Sequence[int], tokens: int) -> None:
        """Note that the sequences at these places, `tokens` recorded positions in all, are in the sums."""
        self.done += places
        self.tokens += tokens

    def merge(self, other: "ProfileState") -> None:
        """Add what another state recorded of other sequences."""
        for mine, theirs in ((self.moments, other.moments), (self.neurons, other.neurons), (self.heads, other.heads)):
            for key, value in mine.items():
                value.merge(theirs[key])  # pyright: ignore[reportArgumentType]
        self.reservoir.merge(other.reservoir)
        self.finished(other.done, other.tokens)

    def on_host(self) -> "ProfileState":
        """Itself with every sum moved to the CPU; the sample stays where its layers are."""
        for site, moments in self.moments.items():
            self.moments[site] = moved(moments, torch.device("cpu"))
        for layer in self.layers:
            self.neurons[layer] = moved(self.neurons[layer], torch.device("cpu"))
            self.heads[layer] = moved(self.heads[layer], torch.device("cpu"))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a shard."""
        named = {"done": torch.tensor(self.done, dtype=torch.int64), "tokens": torch.tensor([self.tokens])}
        parts: dict[str, Moments | NeuronSums | HeadSums | Reservoir] = {}
        parts |= {f"moments.{site.layer}.{site.kind}": moments for site, moments in self.moments.items()}
        parts |= {f"neurons.{layer}": sums for layer, sums in self.neurons.items()}
        parts |= {f"heads.{layer}": sums for layer, sums in self.heads.items()}
        parts["reservoir"] = self.reservoir
        return named | {f"{name}/{key}": t for name, part in parts.items() for key, t in part.tensors().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the state whose `tensors()` these are."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        self.done, self.tokens = state["done"].tolist(), int(state["tokens"])
        for site in self.moments:
            self.moments[site] = Moments.of_tensors(parts[f"moments.{site.layer}.{site.kind}"])
        for layer in self.layers:
            self.neurons[layer] = NeuronSums.of_tensors(parts[f"neurons.{layer}"])
            self.heads[layer] = HeadSums.of_tensors(parts[f"heads.{layer}"])
        self.reservoir.load(parts["reservoir"])
