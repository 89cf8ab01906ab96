"""What a recording has seen so far: it merges, is written as a shard, and is taken up again from one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.core.reservoir import Reservoir
from actsparse.core.routing import RouterSums
from actsparse.core.streaming import HeadSums, Moments, NeuronSums, moved
from actsparse.models.load import LoadedModel
from actsparse.models.taps import IN_EXPERTS
from actsparse.results import SHARED_EXPERT, Site, SiteKind

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

    `neurons`: by place among the model's FFNs, which `ffns` gives as (layer, expert); in a dense model these are its
    layers. Experts share the moments of their layer, the one that serves every token has its own; `reservoir` holds
    layers without experts, `routers` the others, and `experts` the sample of every expert, by its place. `done`: the
    places of the sequences that are in it, in the order in which they were recorded.
    """

    layers: tuple[int, ...]
    moments: dict[Site, Moments]
    neurons: dict[int, NeuronSums]
    heads: dict[int, HeadSums]
    reservoir: Reservoir
    done: list[int]
    ffns: dict[int, tuple[int, int | None]]
    routers: dict[int, RouterSums]
    experts: dict[int, Reservoir]
    tokens: int = 0

    @classmethod
    def empty(
        cls, loaded: LoadedModel, layers: tuple[int, ...], slots: int, kinds: tuple[SiteKind, ...] = MOMENT_KINDS
    ) -> "ProfileState":
        """Nothing recorded yet; `slots` token positions of room for the sample, and for that of every expert."""
        shape = loaded.record
        kinds = tuple(kind for kind in kinds if shape.gated or kind is not SiteKind.UP)
        ffns = {place: ffn for place, ffn in enumerate(loaded.sites.ffns) if ffn.layer.index in layers}
        mixed = tuple(layer for layer in loaded.sites.moe_layers if layer in layers)
        shared = [ffn.layer.index for ffn in ffns.values() if ffn.expert == SHARED_EXPERT]
        places = [Site(layer=layer, kind=kind) for layer in layers for kind in kinds]
        places += [
            Site(layer=layer, kind=kind, expert=SHARED_EXPERT)
            for layer in shared
            for kind in kinds
            if kind in IN_EXPERTS
        ]
        return cls(
            layers=layers,
            moments={site: Moments() for site in places},
            neurons={place: NeuronSums.zeros(ffn.width) for place, ffn in ffns.items()},
            heads={layer: HeadSums.zeros(shape.heads, shape.kv_heads) for layer in layers},
            reservoir=Reservoir.empty(
                slots,
                tuple(layer for layer in layers if layer not in mixed),
                shape.intermediate_size,
                loaded.model.dtype,
            ),
            done=[],
            ffns={place: (ffn.layer.index, ffn.expert) for place, ffn in ffns.items()},
            routers={layer: RouterSums.zeros() for layer in mixed},
            experts={
                place: Reservoir.empty(slots, (place,), ffn.width, loaded.model.dtype)
                for place, ffn in ffns.items()
                if ffn.expert is not None
            },
        )

    @property
    def sampled(self) -> tuple[int, ...]:
        """The layers that have a sample of neuron activations: those without experts."""
        return tuple(self.reservoir.layers)

    @property
    def sequences(self) -> int:
        return len(self.done)

    def finished(self, places: Sequence[int], tokens: int) -> None:
        """Note that the sequences at these places, `tokens` recorded positions in all, are in the sums."""
        self.done += places
        self.tokens += tokens

    def merge(self, other: "ProfileState") -> None:
        """Add what another state recorded of other sequences."""
        for mine, theirs in (
            (self.moments, other.moments),
            (self.neurons, other.neurons),
            (self.heads, other.heads),
            (self.routers, other.routers),
            (self.experts, other.experts),
        ):
            for key, value in mine.items():
                value.merge(theirs[key])  # pyright: ignore[reportArgumentType]
        self.reservoir.merge(other.reservoir)
        self.finished(other.done, other.tokens)

    def on_host(self) -> "ProfileState":
        """Itself with every sum moved to the CPU; the sample stays where its layers are."""
        for site, moments in self.moments.items():
            self.moments[site] = moved(moments, torch.device("cpu"))
        for place, sums in self.neurons.items():
            self.neurons[place] = moved(sums, torch.device("cpu"))
        for layer in self.layers:
            self.heads[layer] = moved(self.heads[layer], torch.device("cpu"))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a shard."""
        named = {"done": torch.tensor(self.done, dtype=torch.int64), "tokens": torch.tensor([self.tokens])}
        parts: dict[str, Moments | NeuronSums | HeadSums | RouterSums | Reservoir] = {}
        parts |= {f"moments.{site.layer}.{site.name}": moments for site, moments in self.moments.items()}
        parts |= {f"neurons.{layer}": sums for layer, sums in self.neurons.items()}
        parts |= {f"heads.{layer}": sums for layer, sums in self.heads.items()}
        parts |= {f"routers.{layer}": sums for layer, sums in self.routers.items()}
        parts |= {f"experts.{place}": sample for place, sample in self.experts.items()}
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
            self.moments[site] = Moments.of_tensors(parts[f"moments.{site.layer}.{site.name}"])
        for place in self.neurons:
            self.neurons[place] = NeuronSums.of_tensors(parts[f"neurons.{place}"])
        for layer in self.routers:
            self.routers[layer] = RouterSums.of_tensors(parts[f"routers.{layer}"])
        for layer in self.layers:
            self.heads[layer] = HeadSums.of_tensors(parts[f"heads.{layer}"])
        for place, sample in self.experts.items():
            sample.load(parts[f"experts.{place}"])
        self.reservoir.load(parts["reservoir"])
