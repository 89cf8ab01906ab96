"""Running the probes of a profile; each finished one is a shard, so that a killed run goes on after it."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor

from actsparse.core.mask_rules import MaskKind
from actsparse.pipelines.halving import halving
from actsparse.pipelines.probes.gradients import gradients
from actsparse.pipelines.probes.inertia import inertia
from actsparse.pipelines.probes.names import GRADIENTS
from actsparse.pipelines.probes.popularity import Popularity, measure_popularity
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.text import ProbeTexts
from actsparse.pipelines.probes.uncertainty import uncertainty
from actsparse.pipelines.probes.union import union
from actsparse.pipelines.progress import Progress
from actsparse.results import Measure
from actsparse.store import tensors
from actsparse.store.codec import decode, encode
from actsparse.store.files import write_bytes
from actsparse.store.run import RunWriter

T = TypeVar("T")

RUNNERS: dict[str, Callable[[Setting], Found]] = {
    "uncertainty": uncertainty,
    "inertia": inertia,
    "union": union,
    GRADIENTS: gradients,
}
TENSORS = "probes.safetensors"


def run_probes(
    names: tuple[str, ...],
    reader: NeuronReader,
    texts: ProbeTexts,
    writer: RunWriter,
    progress: Progress,
) -> list[Measure]:
    """The rows of the probes `names`; their tensors are written beside the tables of the run."""
    for text in (*texts.warnings(names), *_mask_warnings(reader)):
        writer.warn(text)
        progress.warn(text)
    setting = Setting(reader, texts, _popularity(reader, texts, writer, progress), progress)
    rows: list[Measure] = []
    arrays: dict[str, Tensor] = {}
    for name in names:
        found = _finished(name, reader.layers, writer)
        if found is None:
            found = _halving(partial(RUNNERS[name], setting), reader, progress)
            _finish(name, found, writer)
        else:
            progress.note(f"resuming: the probe {name} was finished before")
        rows += found.rows
        arrays |= found.tensors
    if arrays:
        tensors.write(writer.path / TENSORS, arrays)
    return rows


def _mask_warnings(reader: NeuronReader) -> list[str]:
    activation = reader.loaded.record.activation
    if "relu" in activation.lower() or all(rule.kind is not MaskKind.EXACT for rule in reader.rules):
        return []
    return [f"exact masks keep every neuron that is not 0, and {activation} makes no zeros: their kappas are undefined"]


def _popularity(reader: NeuronReader, texts: ProbeTexts, writer: RunWriter, progress: Progress) -> Popularity:
    shard = writer.shard("probes-firing.safetensors")
    if shard.exists():
        return Popularity.of_tensors(tensors.read(shard), reader.rules)
    measure = partial(measure_popularity, reader, texts.calibration, texts.sink_tokens, progress)
    found = _halving(measure, reader, progress)
    tensors.write(shard, found.tensors())
    return found


def _halving(measure: Callable[[], T], reader: NeuronReader, progress: Progress) -> T:
    """What `measure` returns; where memory does not suffice it starts anew, and the reader's batches stay half."""

    def attempt(tokens: int | None) -> T:
        if tokens is not None:
            reader.shrink(tokens)
        return measure()

    return halving(attempt, None, reader.batch_tokens, progress, "tokens")


def _finished(name: str, layers: tuple[int, ...], writer: RunWriter) -> Found | None:
    rows, arrays = writer.shard(f"probe-{name}.json"), writer.shard(f"probe-{name}.safetensors")
    if not rows.exists():
        return None
    found = decode(rows.read_bytes(), list[Measure], str(rows))
    return Found(layers, found, tensors.read(arrays) if arrays.exists() else {})


def _finish(name: str, found: Found, writer: RunWriter) -> None:
    """Tensors first: the rows mark the probe as finished."""
    if found.tensors:
        tensors.write(writer.shard(f"probe-{name}.safetensors"), found.tensors)
    write_bytes(writer.shard(f"probe-{name}.json"), encode(found.rows))
