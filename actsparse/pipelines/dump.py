"""Raw recording: activations token by token, for those who need more than statistics. Bounded, and announced first."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.head_norms import unit_grams
from actsparse.core.row_sums import output_norms
from actsparse.data.sequences import Sequences
from actsparse.errors import ModelError, RunError
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.progress import Progress
from actsparse.results import ModelRecord, Site, SiteKind
from actsparse.specs import ATTENTION_ENTROPY, HEAD_NORM, DumpSpec
from actsparse.store import tensors
from actsparse.store.run import RunWriter, dump_name

SHARD_BYTES = 128 * 2**20

# A token's rows by name, and its id, position and sequence.
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Dump:
    """What is written of each token: `widths` numbers of `sizes` bytes each, by the name of the tensor."""

    spec: DumpSpec
    layers: tuple[int, ...]
    kinds: tuple[SiteKind, ...]
    widths: dict[str, int]
    sizes: dict[str, int]
    tokens: int

    @classmethod
    def of(cls, spec: DumpSpec, loaded: LoadedModel, layers: tuple[int, ...], sequences: Sequences) -> "Dump":
        """The dump that `spec` asks for; raises ModelError where this model has no such kind."""
        shape, itemsize = loaded.record, loaded.model.dtype.itemsize
        chosen = {layer for layer in layers if spec.layers is None or layer in spec.layers}
        kinds = tuple(SiteKind(kind) for kind in spec.kinds if kind not in (HEAD_NORM, ATTENTION_ENTROPY))
        if SiteKind.UP in kinds and not shape.gated:
            raise ModelError(
                f"model type '{shape.model_type}' has no up projection to dump", "leave `up` out of --dump"
            )
        sink = sequences.record.sink_tokens
        there = sum(max(0, len(ids) - sink) for ids in sequences.ids)
        names = {f"layers.{layer}.{kind}": kind for layer in sorted(chosen) for kind in spec.kinds}
        return cls(
            spec=spec,
            layers=tuple(sorted(chosen)),
            kinds=kinds,
            widths={name: _width(kind, shape) for name, kind in names.items()},
            sizes={name: itemsize if kind in kinds else 4 for name, kind in names.items()},
            tokens=min(spec.tokens, there),
        )

    @property
    def bytes_per_token(self) -> int:
        """Every entry, and three int64: id, position, sequence."""
        return sum(width * self.sizes[name] for name, width in self.widths.items()) + 24

    def announce(self, folder: Path, progress: Progress) -> None:
        """Say how much will be written; raises RunError where the disk has no room for it."""
        size = self.tokens * self.bytes_per_token
        progress.note(
            f"dump: {self.tokens:,} tokens x {self.bytes_per_token:,} bytes = {size / 2**20:,.1f} MB into {folder}"
        )
        free = shutil.disk_usage(folder).free
        if size > free:
            raise RunError(
                f"the dump needs {size / 2**20:,.0f} MB, and {folder} has {free / 2**20:,.0f} MB left",
                "name fewer layers or kinds in --dump, or fewer tokens with --dump-tokens",
            )


def write_dump(dump: Dump, loaded: LoadedModel, sequences: Sequences, writer: RunWriter, progress: Progress) -> None:
    """Write the first `dump.tokens` positions after the sink tokens, sequence after sequence.

    A shard of about 128 MB holds whole sequences (the last one may be cut), so a killed run goes on after its last
    whole shard.
    """
    dump.announce(writer.path, progress)
    finished, following, shard = _written(writer)
    held: list[Rows] = []
    left = dump.tokens - finished
    with progress.task("dumping activations", dump.tokens, "tokens") as advance, _reading(dump, loaded) as read:
        advance(finished)
        for place in range(following, len(sequences)):
            ids, sink = sequences.ids[place], sequences.record.sink_tokens
            stop = min(len(ids), sink + left)
            if left <= 0 or stop <= sink:
                continue
            rows = read(ids[:stop], sink)
            positions = torch.arange(sink, stop)
            held.append(
                {"token_ids": ids[sink:stop].clone(), "positions": positions,
                 "sequences": torch.full_like(positions, place), **rows}
            )  # fmt: skip
            left -= stop - sink
            advance(stop - sink)
            if left <= 0 or sum(len(part["positions"]) for part in held) * dump.bytes_per_token >= SHARD_BYTES:
                _flush(held, shard, writer)
                shard, held = shard + 1, []
    if held:
        _flush(held, shard, writer)
        shard += 1
    for number in range(shard):
        writer.keep(dump_name(number))


def _flush(held: list[Rows], shard: int, writer: RunWriter) -> None:
    name = dump_name(shard)
    tensors.write(writer.shard(name), {key: torch.cat([rows[key] for rows in held]) for key in held[0]})


def _written(writer: RunWriter) -> tuple[int, int, int]:
    """(tokens, next sequence, next shard) after the shards that an interrupted attempt finished."""
    tokens = following = shard = 0
    while (path := writer.shard(dump_name(shard))).exists():
        found = tensors.read(path)
        tokens += len(found["positions"])
        following = int(found["sequences"][-1]) + 1
        shard += 1
    return tokens, following, shard


@contextmanager
def _reading(dump: Dump, loaded: LoadedModel) -> "Iterator[_Reader]":
    """A reader of single sequences; the attention is eager while it gives its weights, and restored."""
    reader = _Reader(dump, loaded)
    if ATTENTION_ENTROPY not in dump.spec.kinds:
        yield reader
        return
    before = loaded.model.config._attn_implementation or "eager"
    loaded.model.set_attn_implementation("eager")
    if loaded.model.config._attn_implementation != "eager":
        raise ModelError(
            f"model type '{loaded.record.model_type}' gives no attention weights: its attention cannot be made eager",
            f"leave {ATTENTION_ENTROPY} out of --dump",
        )
    try:
        yield reader
    finally:
        loaded.model.set_attn_implementation(before)


class _Reader:
    """Runs one sequence and gives the rows of its positions from `first` on, by name."""

    def __init__(self, dump: Dump, loaded: LoadedModel) -> None:
        self.dump, self.loaded = dump, loaded
        shape = loaded.record
        self._grams = {
            layer: unit_grams(loaded.sites.layers[layer].output_matrix(shape.heads * shape.head_dim), shape.heads)
            for layer in (dump.layers if HEAD_NORM in dump.spec.kinds else ())
        }

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, " tokens"], first: int) -> Rows:
        found: Rows = {}
        kinds = set(self.dump.kinds)

        def on_value(site: Site, x: Float[Tensor, "1 seq width"]) -> None:
            rows = x[0, first:]
            if site.kind in kinds:
                found[f"layers.{site.layer}.{site.kind}"] = rows.cpu()
            if site.kind is SiteKind.ATTN_OUT and site.layer in self._grams:
                norms = output_norms(rows.float(), self._grams[site.layer].to(rows.device))
                found[f"layers.{site.layer}.{HEAD_NORM}"] = norms.cpu()

        tapped_kinds = kinds | ({SiteKind.ATTN_OUT} if self._grams else set())
        entropy = ATTENTION_ENTROPY in self.dump.spec.kinds
        with tapped(self.loaded.sites, dict.fromkeys(tapped_kinds, on_value), self.dump.layers):
            output = self.loaded.model.base_model(
                input_ids=ids[None].to(self.loaded.device), use_cache=False, output_attentions=entropy
            )
        for layer in self.dump.layers if entropy else ():
            weights = output.attentions[layer] if output.attentions else None
            if weights is None:
                raise ModelError(
                    f"layer {layer}: this model gives no attention weights", f"leave {ATTENTION_ENTROPY} out of --dump"
                )
            found[f"layers.{layer}.{ATTENTION_ENTROPY}"] = attention_entropy(weights)[0, :, first:].T.cpu().contiguous()
        return found


def attention_entropy(weights: Float[Tensor, "batch heads seq keys"]) -> Float[Tensor, "batch heads seq"]:
    """The entropy of every query's attention, in nats: 0 where one key has all of it, log(keys) where all share it."""
    p = weights.float()
    return -torch.special.xlogy(p, p).sum(dim=-1)


def _width(kind: str, shape: ModelRecord) -> int:
    if kind in (HEAD_NORM, ATTENTION_ENTROPY):
        return shape.heads
    widths = {SiteKind.ATTN_IN: shape.hidden_size, SiteKind.MLP_IN: shape.hidden_size}
    widths |= {SiteKind.ATTN_OUT: shape.heads * shape.head_dim}
    return widths.get(SiteKind(kind), shape.intermediate_size)
