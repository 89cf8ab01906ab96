"""Recording: from hooks to statistics. A forward pass over padded batches, read sequence by sequence."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actsparse.core.reservoir import Reservoir, position_keys
from actsparse.core.streaming import HeadGrams, HeadSums, Moments, NeuronSums
from actsparse.models.load import LoadedModel
from actsparse.models.taps import Callback, tapped
from actsparse.results import Site, SiteKind

BATCH_TOKENS = 2048
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
    """Everything recorded so far: O(layers x neurons), whatever the number of tokens. States merge."""

    layers: tuple[int, ...]
    moments: dict[Site, Moments]
    neurons: dict[int, NeuronSums]
    heads: dict[int, HeadSums]
    reservoir: Reservoir
    sequences: int = 0
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
        )

    def merge(self, other: "ProfileState") -> None:
        """Add what another state recorded of other sequences."""
        for mine, theirs in ((self.moments, other.moments), (self.neurons, other.neurons), (self.heads, other.heads)):
            for key, value in mine.items():
                value.merge(theirs[key])  # pyright: ignore[reportArgumentType]
        self.reservoir.merge(other.reservoir)
        self.sequences += other.sequences
        self.tokens += other.tokens

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a shard."""
        named = {"seen": torch.tensor([self.sequences, self.tokens])}
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
        self.sequences, self.tokens = (int(value) for value in state["seen"])
        for site in self.moments:
            self.moments[site] = Moments.of_tensors(parts[f"moments.{site.layer}.{site.kind}"])
        for layer in self.layers:
            self.neurons[layer] = NeuronSums.of_tensors(parts[f"neurons.{layer}"])
            self.heads[layer] = HeadSums.of_tensors(parts[f"heads.{layer}"])
        self.reservoir.load(parts["reservoir"])


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: input_ids and attention_mask [batch, seq], and each one's own ids."""

    input_ids: Tensor
    attention_mask: Tensor
    sequences: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)


def batches(sequences: tuple[Tensor, ...], batch_size: int | None) -> Iterator[Batch]:
    """Consecutive sequences in batches of `batch_size`, or of at most 2,048 padded tokens."""
    group: list[Tensor] = []
    for ids in sequences:
        longest = max([len(ids), *(len(one) for one in group)])
        full = len(group) == batch_size if batch_size else longest * (len(group) + 1) > BATCH_TOKENS
        if group and full:
            yield _padded(group)
            group = []
        group.append(ids)
    if group:
        yield _padded(group)


def _padded(group: list[Tensor]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
    lengths = torch.tensor([len(one) for one in group])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return Batch(ids, mask, tuple(group))


class Recorder:
    """Feeds a ProfileState from forward passes of one model; sink tokens and padding are left out."""

    def __init__(self, loaded: LoadedModel, state: ProfileState, *, sink_tokens: int, seed: int) -> None:
        self.loaded = loaded
        self.state = state
        self.sink_tokens = sink_tokens
        self.seed = seed
        shape = loaded.record
        sites = {layer.index: layer for layer in loaded.sites.layers if layer.index in state.layers}
        self._down_norms = {
            i: layer.down_matrix(shape.intermediate_size).float().norm(dim=0) for i, layer in sites.items()
        }
        self._grams = {
            i: HeadGrams.of(layer.output_matrix(shape.heads * shape.head_dim), shape.heads, shape.kv_heads)
            for i, layer in sites.items()
            if Site(layer=i, kind=SiteKind.ATTN_OUT) in state.moments
        }
        self._spans: list[tuple[int, slice]] = []
        self._admitted: list[tuple[int, Tensor, Tensor]] = []

    @torch.no_grad()
    def record(self, batch: Batch) -> None:
        """Run one batch through the model and add its activations to the state."""
        kinds = {site.kind for site in self.state.moments}
        self._spans = [
            (index, slice(self.sink_tokens, len(ids)))
            for index, ids in enumerate(batch.sequences)
            if len(ids) > self.sink_tokens
        ]
        self._admitted = [self._admit(index, batch.sequences[index]) for index, _ in self._spans]
        callbacks: dict[SiteKind, Callback] = dict.fromkeys(kinds, self._on_value)
        device = self.loaded.device
        with tapped(self.loaded.sites, callbacks, self.state.layers):
            self.loaded.model.base_model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
        self.state.sequences += len(batch.sequences)
        self.state.tokens += sum(span.stop - span.start for _, span in self._spans)

    def _admit(self, index: int, ids: Tensor) -> tuple[int, Tensor, Tensor]:
        """Which positions of a sequence enter the sample: (row of the batch, positions, slots)."""
        digest = int.from_bytes(hashlib.sha256(ids.numpy().tobytes()).digest()[:8], "little")
        positions = np.arange(self.sink_tokens, len(ids))
        places, slots = self.state.reservoir.admit(position_keys(digest, positions, self.seed))
        return index, places + self.sink_tokens, slots

    def _on_value(self, site: Site, x: Tensor) -> None:
        moments = self.state.moments[site]
        for index, span in self._spans:
            rows = x[index, span]
            moments.add(rows)
            if site.kind is SiteKind.NEURON:
                norms = self._down_norms[site.layer].to(rows.device)
                self.state.neurons[site.layer].add(rows, norms, span.start)
            elif site.kind is SiteKind.UP:
                self.state.neurons[site.layer].add_up(rows)
            elif site.kind is SiteKind.ATTN_OUT:
                self.state.heads[site.layer].add(rows, self._grams[site.layer])
        if site.kind is SiteKind.NEURON:
            for index, places, slots in self._admitted:
                self.state.reservoir.put(site.layer, slots, x[index, places.to(x.device)])
