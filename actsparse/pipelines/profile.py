"""`profile`: record a model's activations on texts and write what was found."""

from dataclasses import replace

import torch

from actsparse.core.cett import CettLayer, CettSolution
from actsparse.core.reservoir import capacity
from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.errors import DataError, ModelError
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.identity import data_identity, model_identity
from actsparse.pipelines.probes.names import probe_names
from actsparse.pipelines.probes.run import run_probes
from actsparse.pipelines.probes.text import ProbeTexts, probe_texts
from actsparse.pipelines.profile_state import ProfileState
from actsparse.pipelines.profile_tables import head_rows, measure_rows, neuron_rows
from actsparse.pipelines.progress import Progress, Silent, describe
from actsparse.pipelines.recording import Shards, not_finite, record_sequences
from actsparse.results import HeadRow, Measure, NeuronRow, RunKind
from actsparse.specs import ProfileSpec
from actsparse.store import tables, tensors
from actsparse.store.codec import builtins, pretty
from actsparse.store.files import write_bytes
from actsparse.store.fingerprint import asked
from actsparse.store.run import RunRequest, RunWriter, open_run
from actsparse.store.runs import ProfileRun


def profile(spec: ProfileSpec, progress: Progress | None = None) -> ProfileRun:
    """Record what `spec` asks for; returns the complete run, new or up to date.

    Raises ActsparseError where model, text or output cannot be used as asked.
    """
    progress = progress or Silent()
    spec = replace(spec, probes=probe_names(spec.probes))
    loaded = load(spec.model, progress.note)
    progress.detail(describe(loaded.record, str(loaded.device)))
    reader = TextReader(spec.data, loaded.tokenizer, loaded.record.max_positions, progress.note)
    sequences = reader.profile_sequences()
    layers = chosen_layers(spec.layers, loaded)
    sink = spec.data.sink_tokens
    if not any(len(ids) > sink for ids in sequences.ids):
        raise DataError(f"no token is left after the first {sink} of each sequence", "give longer texts")
    probed = probe_texts(reader, spec.probes, loaded.record.vocab_size) if spec.probes else None
    with open_run(_request(spec, loaded, sequences, probed)) as writer:
        if writer.complete:
            progress.note(f"{writer.path} is up to date")
        else:
            _record_and_write(spec, loaded, sequences, probed, layers, writer, progress)
    return ProfileRun.open(writer.path)


def chosen_layers(asked_for: tuple[int, ...] | None, loaded: LoadedModel) -> tuple[int, ...]:
    """The layers to record; raises ModelError naming one that the model does not have."""
    count = len(loaded.sites.layers)
    for layer in asked_for or ():
        if not 0 <= layer < count:
            raise ModelError(f"there is no layer {layer}: the model has layers 0 to {count - 1}", "correct --layers")
    return tuple(sorted(set(asked_for))) if asked_for else tuple(range(count))


def solve_cett(
    loaded: LoadedModel, state: ProfileState, targets: tuple[float, ...], progress: Progress
) -> dict[int, CettSolution]:
    """CETT of every recorded layer, by layer."""
    found: dict[int, CettSolution] = {}
    with progress.task("solving CETT", len(state.layers), "layers") as advance:
        for layer in state.layers:
            down = loaded.sites.layers[layer].down_matrix(loaded.record.intermediate_size)
            found[layer] = CettSolution.of(CettLayer.of(state.reservoir.rows(layer).to(down.device), down), targets)
            advance(1)
    return found


def _request(spec: ProfileSpec, loaded: LoadedModel, sequences: Sequences, probed: ProbeTexts | None) -> RunRequest:
    return RunRequest(
        kind=RunKind.PROFILE,
        identity={
            "asked": {**asked(spec), "model": None, "data": data_identity(spec.data)},
            "model": model_identity(loaded),
            "text": sequences.record.sha256,
            **({} if probed is None else {"probe_calibration": probed.calibration_sha256}),
        },
        spec=spec,
        model=loaded.record,
        texts=(sequences.record,),
        output=spec.output,
        root=spec.root,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _record_and_write(
    spec: ProfileSpec,
    loaded: LoadedModel,
    sequences: Sequences,
    probed: ProbeTexts | None,
    layers: tuple[int, ...],
    writer: RunWriter,
    progress: Progress,
) -> None:
    width, itemsize = loaded.record.intermediate_size, loaded.model.dtype.itemsize
    state = record_sequences(
        loaded,
        sequences,
        layers=layers,
        slots=capacity(spec.reservoir_tokens, spec.reservoir_mb, len(layers), width, itemsize),
        seed=spec.data.seed,
        batch_size=spec.batch_size,
        what="recording",
        progress=progress,
        shards=Shards(writer.shard("state").parent, "state"),
        strict=spec.strict,
    )
    for text in not_finite(state):
        writer.warn(text)
        progress.warn(text)
    measures = measure_rows(state, solve_cett(loaded, state, spec.cett_targets, progress))
    if probed is not None:
        measures += run_probes(spec.probes, loaded, layers, probed, writer, progress)
    _write(loaded, state, measures, writer)


def _write(loaded: LoadedModel, state: ProfileState, measures: list[Measure], writer: RunWriter) -> None:
    norms = {
        layer: loaded.sites.layers[layer].down_norms(loaded.record.intermediate_size).cpu() for layer in state.layers
    }
    tables.write(writer.path / "measures.parquet", tables.frame(measures, Measure))
    tables.write(writer.path / "neurons.parquet", tables.frame(neuron_rows(state, norms), NeuronRow))
    tables.write(writer.path / "heads.parquet", tables.frame(head_rows(state), HeadRow))
    histograms = {}
    for site, moments in state.moments.items():
        counts, edges = moments.histogram.trimmed()
        histograms |= {
            f"layers.{site.layer}.{site.kind}.counts": counts,
            f"layers.{site.layer}.{site.kind}.edges": edges,
        }
    tensors.write(writer.path / "histograms.safetensors", histograms)
    reservoir = {f"layers.{layer}.neuron": state.reservoir.rows(layer) for layer in state.layers}
    tensors.write(writer.path / "reservoir.safetensors", reservoir)
    summary = {
        "model": builtins(loaded.record),
        "data": builtins(writer.manifest.texts[0]),
        "measures": builtins(measures),
        "warnings": list(writer.warnings),
        "run": str(writer.path),
    }
    write_bytes(writer.path / "summary.json", pretty(summary).encode())
    writer.finish()
