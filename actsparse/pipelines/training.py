"""The sample of calibration tokens that routers are trained on, bounded in memory whatever the model's size."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.errors import ActsparseError, DataError, PlanError
from actsparse.methods.training import LayerPairs
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.progress import Advance, Progress
from actsparse.results import Site, SiteKind
from actsparse.store import tensors
from actsparse.store.run import RunWriter

SAMPLE_BYTES = 512 * 2**20
HELD_SHARE = 0.2
EXACT_ZEROS = ("relu", "relu2", "relu6", "squared_relu", "reluactivation", "relusquaredactivation")


class Checkpoints(Protocol):
    """Where finished parts of a training are kept."""

    def path(self, name: str) -> Path | None:
        """The file of a part; None where nothing is kept."""
        ...


@dataclass(frozen=True)
class RunCheckpoints:
    """Finished parts are shards of the run at work, which a repeated command finds."""

    writer: RunWriter

    def path(self, name: str) -> Path | None:
        return self.writer.shard(f"{name}.safetensors")


class NoCheckpoints:
    """Keeps nothing."""

    def path(self, name: str) -> Path | None:
        del name
        return None


NO_CHECKPOINTS = NoCheckpoints()


@dataclass(frozen=True)
class TrainingReplay:
    """Calibration blocks run dense, of which a seeded sample of positions is kept."""

    loaded: LoadedModel
    blocks: Sequences
    progress: Progress
    checkpoints: Checkpoints

    @property
    def hidden(self) -> int:
        """See `methods.training.Training`."""
        return self.loaded.record.hidden_size

    @property
    def exact_zeros(self) -> bool:
        """See `methods.training.Training`."""
        return self.loaded.record.activation.lower() in EXACT_ZEROS

    def pairs(
        self,
        site: SiteKind,
        layers: Sequence[int],
        *,
        ahead: int,
        tokens: int,
        seed: int,
        target: SiteKind = SiteKind.NEURON,
    ) -> Iterator[LayerPairs]:
        """See `methods.training.Training`."""
        positions = sample_positions(self.blocks, tokens, seed)
        shape = self.loaded.record
        done = shape.intermediate_size if target is SiteKind.NEURON else shape.heads * shape.head_dim
        width = shape.hidden_size + done
        size = len(positions) * width * self.loaded.model.dtype.itemsize
        step = max(1, SAMPLE_BYTES // size)
        for start in range(0, len(layers), step):
            yield from self._group(site, target, layers[start : start + step], ahead, positions)

    def _group(
        self, site: SiteKind, target: SiteKind, layers: Sequence[int], ahead: int, positions: "Positions"
    ) -> Iterator[LayerPairs]:
        sources = {layer: max(0, layer - ahead) for layer in layers}
        inputs: dict[int, list[Tensor]] = {source: [] for source in sources.values()}
        outputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        chosen = torch.empty(0, dtype=torch.int64)

        def on_input(at: Site, x: Tensor) -> None:
            if at.layer in inputs:
                inputs[at.layer].append(x[0, chosen.to(x.device)])

        def on_target(at: Site, a: Tensor) -> None:
            if at.layer in outputs:
                outputs[at.layer].append(a[0, chosen.to(a.device)])

        what = f"sampling layers {min(layers)}-{max(layers)} for training"
        with (
            self.progress.task(what, self.blocks.tokens, "tokens") as advance,
            tapped(self.loaded.sites, {site: on_input, target: on_target}, tuple({*inputs, *outputs})),
            torch.no_grad(),
        ):
            for index, ids in enumerate(self.blocks.ids):
                chosen = positions.of_block(index)
                if len(chosen):
                    self.loaded.model.base_model(input_ids=ids[None].to(self.loaded.device), use_cache=False)
                advance(len(ids))
        for layer in layers:
            x, a = torch.cat(inputs[sources[layer]]), torch.cat(outputs.pop(layer))
            cut = positions.training
            yield LayerPairs(layer, x[:cut], a[:cut], x[cut:], a[cut:])

    def read_rows(self, layer: int) -> Tensor:
        """See `methods.training.Training`."""
        weights = self.loaded.sites.layers[layer].mlp_weights()
        return (weights.up if weights.gate is None else weights.gate).detach().float()

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """See `methods.training.Training`."""
        path = self.checkpoints.path(name)
        return tensors.read(path) if path is not None and path.exists() else None

    def keep(self, name: str, finished: dict[str, Tensor]) -> None:
        """See `methods.training.Training`."""
        path = self.checkpoints.path(name)
        if path is not None:
            tensors.write(path, finished)

    def read_file(self, path: Path) -> dict[str, Tensor]:
        """See `methods.training.Training`."""
        try:
            return tensors.read(path)
        except ActsparseError as error:
            raise PlanError(
                f"no routers can be read: {error.what}",
                "give the plan.safetensors of a plan for this model, or leave weights out to train",
            ) from None

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """See `methods.training.Training`."""
        return self.progress.task(what, total, unit)


@dataclass(frozen=True)
class Positions:
    """Sampled positions in the order of the text: the block of each and its place there; the first `training` of them
    train, the others judge."""

    block: Int[Tensor, " sampled"]
    place: Int[Tensor, " sampled"]
    training: int

    def __len__(self) -> int:
        return len(self.block)

    def of_block(self, index: int) -> Int[Tensor, " chosen"]:
        """The places sampled in one block."""
        return self.place[self.block == index]


def sample_positions(blocks: Sequences, tokens: int, seed: int) -> Positions:
    """At most `tokens` positions after the sink tokens, drawn without replacement: four in five from the first four
    fifths of the text, the others from its end. Raises DataError where the text has fewer than ten."""
    sink = blocks.record.sink_tokens
    spans = [(index, place) for index, ids in enumerate(blocks.ids) for place in range(sink, len(ids))]
    if len(spans) < 10:
        raise DataError(
            f"{blocks.record.source} has {len(spans)} tokens to train on, too few", "give more calibration text"
        )
    cut = len(spans) - max(1, round(HELD_SHARE * len(spans)))
    wanted = min(tokens, len(spans))
    held = min(len(spans) - cut, max(1, round(HELD_SHARE * wanted)))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(cut, generator=generator)[: min(cut, wanted - held)]
    last = torch.randperm(len(spans) - cut, generator=generator)[:held] + cut
    chosen = torch.cat([first.sort().values, last.sort().values])
    pairs = torch.tensor(spans)[chosen]
    return Positions(pairs[:, 0], pairs[:, 1], len(first))
