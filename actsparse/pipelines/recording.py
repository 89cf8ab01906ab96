"""Recording: from hooks to statistics. One forward pass over a padded batch; the rows that count are read at once."""

import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.head_norms import HeadNorms
from actsparse.core.reservoir import position_keys
from actsparse.core.rows import Rows
from actsparse.core.streaming import moved
from actsparse.data.sequences import Sequences
from actsparse.errors import ModelError, RunError
from actsparse.models.load import LoadedModel
from actsparse.models.taps import Callback, Tap, tapped
from actsparse.pipelines.batches import Batch, PaddingSide, groups, padded, sent
from actsparse.pipelines.distributed import ALONE, Team
from actsparse.pipelines.halving import fitting, halving
from actsparse.pipelines.profile_state import MOMENT_KINDS, ProfileState
from actsparse.pipelines.progress import Progress
from actsparse.results import Site, SiteKind
from actsparse.store import tensors

CHECKPOINT_SECONDS = 30.0

# What is fed for the sequences of a batch, and the first position of each that counts.
Feed = Callable[[Sequence[Int[Tensor, " tokens"]]], tuple[Sequence[Int[Tensor, " tokens"]], Sequence[int]]]


class Recorder:
    """Feeds a ProfileState from forward passes of one model; sink tokens and padding are left out.

    Sums live where the layer's activations are, so that nothing is copied. A GPU is not waited for, but on mixtures of
    experts: which tokens an expert serves has to be known here.
    """

    def __init__(self, loaded: LoadedModel, state: ProfileState, *, seed: int) -> None:
        self.loaded = loaded
        self.state = state
        self.seed = seed
        shape = loaded.record
        sites = {layer.index: layer for layer in loaded.sites.layers if layer.index in state.layers}
        self._down_norms = {place: loaded.sites.ffns[place].down_norms() for place in state.neurons}
        self._head_norms = {
            i: HeadNorms.of(layer.output_matrix(shape.heads * shape.head_dim), shape.heads, shape.kv_heads)
            for i, layer in sites.items()
            if Site(layer=i, kind=SiteKind.ATTN_OUT) in state.moments
        }
        self._rows = _Places(torch.zeros(0, dtype=torch.int64))
        self._positions = self._sampled = self._slots = self._rows
        self._keys, self._stand = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        self._texts, self._lengths = self._stand, torch.zeros(0, dtype=torch.int64)
        self._tap = Tap()

    @property
    def constant_bytes(self) -> int:
        """What is kept of the weights beside the model's own: norms of down columns, matrices for norms of heads."""
        model = {weight.untyped_storage().data_ptr() for weight in self.loaded.model.parameters()}
        kept = {
            matrix.untyped_storage().data_ptr(): matrix.nbytes
            for norms in self._head_norms.values()
            for matrix in (norms.heads, norms.groups)
        }
        own = sum(size for storage, size in kept.items() if storage not in model)
        return own + sum(norms.nbytes for norms in self._down_norms.values())

    @torch.no_grad()
    def record(self, batch: Batch) -> None:
        """Run one batch through the model and add its activations to the state."""
        self._choose(batch)
        kinds = {site.kind for site in self.state.moments} | ({SiteKind.ROUTER} if self.state.routers else set())
        callbacks: dict[SiteKind, Callback] = dict.fromkeys(kinds, self._on_value)
        device = self.loaded.device
        with tapped(self.loaded.sites, callbacks, self.state.layers) as self._tap:
            self.loaded.model.base_model(
                input_ids=sent(batch.input_ids, device),
                # with a mask, transformers waits for the device to know whether it hides anything
                attention_mask=sent(batch.attention_mask, device) if batch.padded else None,
                use_cache=False,
                **self._placed(batch),
            )

    def _placed(self, batch: Batch) -> dict[str, Tensor]:
        """`position_ids` of a batch padded on the left, for models that take them; others read the mask."""
        places = batch.position_ids
        if places is None or "position_ids" not in inspect.signature(self.loaded.model.base_model.forward).parameters:
            return {}
        return {"position_ids": sent(places, self.loaded.device)}

    def _choose(self, batch: Batch) -> None:
        """Which rows of the flattened batch count, where they stand, and which of them enter the sample."""
        width = batch.input_ids.shape[1]
        none = np.zeros(0, dtype=np.int64)
        positions = [np.arange(span.start, span.stop) for _, span in batch.spans]
        begins = [row * width + batch.columns[row] for row, _ in batch.spans]
        rows = np.concatenate([none, *(begin + at for begin, at in zip(begins, positions, strict=True))])
        digests = [_digest(batch.sequences[row]) for row, _ in batch.spans]
        keys = [position_keys(digest, at, self.seed) for digest, at in zip(digests, positions, strict=True)]
        texts = [
            np.full(len(at), np.uint64(digest).view(np.int64)) for digest, at in zip(digests, positions, strict=True)
        ]
        self._stand = np.concatenate([none, *positions])
        self._keys = np.concatenate([none.view(np.uint64), *keys])
        self._texts = np.concatenate([none, *texts])
        self._lengths = torch.tensor([len(at) for at in positions])
        places, slots = self.state.reservoir.admit(self._keys, self._stand, self._texts)
        self._rows = _Places(torch.from_numpy(rows))
        self._positions = _Places(torch.from_numpy(self._stand))
        self._sampled = _Places(torch.from_numpy(rows)[places])
        self._slots = _Places(slots)

    def _on_value(self, site: Site, x: Float[Tensor, "batch seq width"]) -> None:
        state, layer = self.state, site.layer
        if site.kind is SiteKind.ROUTER:
            state.routers[layer].add(Rows.of(x, self._rows.on(x.device)).values(), self._lengths)
            return
        index, positions = self._own_rows(x.device)
        rows = Rows.of(x, index)
        pooled = site if site in state.moments else Site(layer=layer, kind=site.kind)
        state.moments[pooled] = moved(state.moments[pooled], x.device)
        state.moments[pooled].add(rows)
        if site.kind is SiteKind.NEURON:
            place = self.loaded.sites.ffn_index[layer, site.expert]
            state.neurons[place] = moved(state.neurons[place], x.device)
            self._down_norms[place] = self._down_norms[place].to(x.device)
            state.neurons[place].add(rows, self._down_norms[place], positions)
            if site.expert is None:
                state.reservoir.put(layer, self._slots.on(x.device), rows.flat[self._sampled.on(x.device)])
            else:
                self._sample_expert(place, rows.flat)
        elif site.kind is SiteKind.UP:
            place = self.loaded.sites.ffn_index[layer, site.expert]
            state.neurons[place] = moved(state.neurons[place], x.device)
            state.neurons[place].add_up(rows)
        elif site.kind is SiteKind.ATTN_OUT:
            state.heads[layer] = moved(state.heads[layer], x.device)
            self._head_norms[layer] = self._head_norms[layer].on(x.device)
            state.heads[layer].add(rows, self._head_norms[layer])

    def _sample_expert(self, place: int, flat: Float[Tensor, "all width"]) -> None:
        """Offer the tokens that an expert serves to its sample."""
        rows, routed = self._rows.on(flat.device), self._tap.routed
        mine = np.arange(len(self._keys))
        if routed is not None:
            mine = np.flatnonzero(routed.flatten()[rows].cpu().numpy())
        sample = self.state.experts[place]
        chosen, slots = sample.admit(self._keys[mine], self._stand[mine], self._texts[mine])
        sample.put(place, slots, flat[rows[torch.from_numpy(mine)[chosen].to(flat.device)]])

    def _own_rows(self, device: torch.device) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """The rows that count and their positions: of an expert, those that were routed to it."""
        rows, positions = self._rows.on(device), self._positions.on(device)
        if self._tap.routed is None:
            return rows, positions
        own = self._tap.routed.flatten()[rows]
        return rows[own], positions[own]


class _Places:
    """Row numbers of one batch, copied once to every device that asks."""

    def __init__(self, places: Int[Tensor, " rows"]) -> None:
        self._on = {places.device: places}

    def on(self, device: torch.device) -> Int[Tensor, " rows"]:
        if device not in self._on:
            self._on[device] = sent(next(iter(self._on.values())), device)
        return self._on[device]


def _digest(ids: Int[Tensor, " tokens"]) -> int:
    return int.from_bytes(hashlib.sha256(ids.numpy().tobytes()).digest()[:8], "little")


@dataclass(frozen=True)
class Shards:
    """Where a recording keeps its state while it is at work: one file a process, `NAME-RANK.safetensors`."""

    folder: Path
    name: str

    def of(self, rank: int) -> Path:
        return self.folder / f"{self.name}-{rank}.safetensors"

    def found(self) -> list[Path]:
        """The files that earlier attempts left, by rank."""
        return sorted(self.folder.glob(f"{self.name}-*.safetensors"), key=lambda path: (len(path.name), path.name))


def record_sequences(
    loaded: LoadedModel,
    sequences: Sequences,
    *,
    layers: tuple[int, ...],
    slots: int,
    seed: int,
    batch_size: int | None,
    what: str,
    progress: Progress,
    kinds: tuple[SiteKind, ...] = MOMENT_KINDS,
    shards: Shards | None = None,
    team: Team = ALONE,
    strict: bool = False,
    feed: Feed | None = None,
    padding_side: PaddingSide = "right",
) -> ProfileState:
    """The statistics of `sequences`; with `shards`, finished batches are kept there and not repeated.

    `feed` says what is fed for the sequences of a batch, and the first position of each that counts (default: the
    sequences themselves, after the sink tokens). In a team, rank 0's state has everything and the others' their own
    share. With `strict`, raises ModelError at the first batch whose activations are not finite. A process that is alone
    halves its batches once where memory does not suffice.
    """

    def attempt(size: int | None) -> ProfileState:
        return _recorded(
            loaded, sequences, layers=layers, slots=slots, seed=seed, batch_size=size, what=what, progress=progress,
            kinds=kinds, shards=shards, team=team, strict=strict, feed=feed, padding_side=padding_side,
        )  # fmt: skip

    largest = max((len(group) for group in groups([len(x) for x in sequences.ids], batch_size)), default=1)
    if team.size > 1:
        with fitting(largest):
            return attempt(batch_size)
    return halving(attempt, batch_size, largest, progress)


def _recorded(
    loaded: LoadedModel,
    sequences: Sequences,
    *,
    layers: tuple[int, ...],
    slots: int,
    seed: int,
    batch_size: int | None,
    what: str,
    progress: Progress,
    kinds: tuple[SiteKind, ...],
    shards: Shards | None,
    team: Team,
    strict: bool,
    feed: Feed | None,
    padding_side: PaddingSide,
) -> ProfileState:
    """`record_sequences` with batches of this size."""
    state = ProfileState.empty(loaded, layers, slots, kinds)
    if shards is not None and team.leads:
        _take_up(state, shards, lambda: ProfileState.empty(loaded, layers, slots, kinds))
    done = set(team.told(state.done))
    if done:
        progress.note(f"resuming: {len(done)} of {len(sequences)} sequences were finished before")
    recorder = Recorder(loaded, state, seed=seed)
    feed = feed or (lambda ids: (ids, [sequences.record.sink_tokens] * len(ids)))
    places = [[i for i in group if i not in done] for group in groups([len(x) for x in sequences.ids], batch_size)]
    since = time.monotonic()
    with progress.task(what, sequences.tokens, "tokens") as advance:
        advance(sum(len(sequences.ids[i]) for i in done))
        own = team.share([group for group in places if group])
        shown = _Share(sequences.tokens - sum(len(sequences.ids[i]) for i in done),
                       sum(len(sequences.ids[i]) for group in own for i in group))  # fmt: skip
        for group in own:
            batch = padded(*feed([sequences.ids[i] for i in group]), padding_side)
            recorder.record(batch)
            state.finished(group, sum(span.stop - span.start for _, span in batch.spans))
            if strict:
                _check_finite(state)
            advance(shown.more(sum(len(sequences.ids[i]) for i in group)))
            if shards is not None and time.monotonic() - since > CHECKPOINT_SECONDS:
                tensors.write(shards.of(team.rank), state.tensors())
                since = time.monotonic()
    if shards is not None:
        tensors.write(shards.of(team.rank), state.tensors())
    state.on_host()
    for other in team.collect(state.tensors()):
        more = ProfileState.empty(loaded, layers, slots, kinds)
        more.load(other)
        state.merge(more)
    return state


@dataclass
class _Share:
    """How far a team is, as far as one process can tell: the share of its own `own` tokens, of `whole`."""

    whole: int
    own: int
    seen: int = 0

    def more(self, tokens: int) -> int:
        """How many tokens of the whole the next `tokens` of one's own stand for."""
        before = self.whole * self.seen // max(1, self.own)
        self.seen += tokens
        return self.whole * self.seen // max(1, self.own) - before


def _take_up(state: ProfileState, shards: Shards, empty: Callable[[], ProfileState]) -> None:
    """Load what earlier attempts left, from however many processes, into one state and one file.

    A file whose sequences another one has (a take-over that was itself interrupted) is left out.
    """
    found: list[tuple[Path, ProfileState]] = []
    for path in shards.found():
        part = empty()
        try:
            part.load(tensors.read(path))
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise RunError(f"{path} is no state of this run: {error}", "start over with --no-resume") from error
        found.append((path, part))
    for path, part in sorted(found, key=lambda one: -one[1].sequences):
        if not state.done:
            state.load(part.tensors())
        elif not set(state.done) & set(part.done):
            state.merge(part)
        if path != shards.of(0):
            tensors.write(shards.of(0), state.tensors())
            path.unlink()


def _check_finite(state: ProfileState) -> None:
    for line in not_finite(state):
        raise ModelError(line, "leave out --strict to count such entries as zeros, or use --dtype float32")


def not_finite(state: ProfileState) -> list[str]:
    """One line a site whose activations were not all finite numbers: how many, in which layer and kind."""
    return [
        f"layer {site.layer}, {site.kind}: {moments.not_finite} activations are NaN or infinite"
        for site, moments in state.moments.items()
        if moments.not_finite
    ]
