"""`study`: the experiments of one paper in a run of their own; finished experiments and scored blocks are kept."""

from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from actsparse.data.network import network
from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.errors import ActsparseError, DataError, ModelError, PlanError
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.halving import fitting
from actsparse.pipelines.identity import data_identity, machine_identity, model_identity
from actsparse.pipelines.progress import Progress, Silent
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Outcome
from actsparse.pipelines.studies.registry import Runner, runners
from actsparse.pipelines.training import RunCheckpoints
from actsparse.results import ClaimVerdict, RunKind, StudyExperiment, StudyRow
from actsparse.specs import StudySpec
from actsparse.store import tables
from actsparse.store.codec import builtins, decode, encode, pretty
from actsparse.store.files import write_bytes
from actsparse.store.fingerprint import asked
from actsparse.store.run import RunRequest, RunWriter, open_run
from actsparse.store.runs import StudyRun

QUICK_BLOCKS, FULL_BLOCKS = 4, 16
QUICK_TOKENS, FULL_TOKENS = 4096, 32768
"""Tokens that routers are trained on."""
TWINS = {"demo": "demo:relu", "demo:silu": "demo:relu", "demo:relu": "demo"}


@dataclass(frozen=True)
class Texts:
    """All blocks of the text, how many are scored, the blocks that plans are fitted on, and those that routers are."""

    pool: Sequences
    count: int
    calibration: Sequences
    training: Sequences
    prompt_length: int
    reader: TextReader


@dataclass(frozen=True)
class Finished:
    """An experiment with its rows, as its shard holds them."""

    experiment: StudyExperiment
    rows: tuple[StudyRow, ...]


def study(spec: StudySpec, progress: Progress | None = None) -> StudyRun:
    """Run the experiments of `spec.study`; returns the complete run, new or up to date.

    Raises ActsparseError where study, model, text or output cannot be used as asked. An experiment that this model
    cannot serve is kept as undecided, with the reason as its sentence.
    """
    with network(offline=spec.model.offline):
        return _studied(spec, progress or Silent())


def _studied(spec: StudySpec, progress: Progress) -> StudyRun:
    chosen = runners(spec.study, spec.only)
    spec = _with_twin(spec)
    loaded = load(spec.model, progress.note)
    if loaded.sites.moe_layers:
        raise ModelError(
            f"{loaded.record.resolved} is a mixture of experts: the studies are defined for dense models",
            "profile it, or evaluate plans: actsparse evaluate --plan griffin@0.5",
        )
    other = None if spec.counterpart is None else load(spec.counterpart, progress.note)
    if other is not None and model_identity(other) == model_identity(loaded):
        raise ModelError(
            f"the counterpart {other.record.resolved} is the model itself: weights, configuration and tokenizer agree",
            "--counterpart names the model with the other activation; leave it out to study one model",
        )
    texts = _texts(spec, loaded, progress)
    with open_run(_request(spec, chosen, loaded, other, texts)) as writer, fitting():
        if writer.complete:
            progress.note(f"{writer.path} is up to date")
        else:
            name, beside_name = _names(spec)
            bench = _bench(name, spec, loaded, texts, writer, progress)
            if other is not None and spec.counterpart is not None:
                beside = replace(spec, model=spec.counterpart)
                texts = _texts(beside, other, progress)
                bench = replace(bench, counterpart=_bench(beside_name, beside, other, texts, writer, progress))
            _write(spec, writer, [_finished(runner, bench) for runner in chosen])
    return StudyRun.open(writer.path)


def _with_twin(spec: StudySpec) -> StudySpec:
    """The shipped twins are each other's counterpart."""
    if spec.counterpart is not None or spec.model.name not in TWINS or spec.study != "pitfalls":
        return spec
    return replace(spec, counterpart=replace(spec.model, name=TWINS[spec.model.name]))


def _texts(spec: StudySpec, loaded: LoadedModel, progress: Progress) -> Texts:
    """The first N blocks are scored, N:2N fitted on (or --calib); the whole text is there for far donors and unions."""
    data = spec.data
    wanted = data.limit or (QUICK_BLOCKS if spec.quick else FULL_BLOCKS)
    reader = TextReader(replace(data, limit=None), loaded.tokenizer, loaded.record.max_positions, progress.note)
    pool = reader.calibration_blocks()
    room = len(pool) if data.calib else len(pool) // 2
    count = wanted if data.limit else min(wanted, room)
    if count < 1 or count > room:
        raise DataError(
            f"{pool.record.source} has {len(pool)} blocks of {reader.block_length} tokens, too few for a study of"
            f" {max(1, count)} and as many to fit on",
            "give more text with --corpus, or shorter blocks with --block-length",
        )
    if data.calib is None:
        calibration = pool.take(range(count, 2 * count), (count, 2 * count))
    else:
        other = replace(reader, spec=replace(reader.spec, corpus=data.calib, calib=None, limit=count))
        calibration = other.profile_sequences()
    first = 0 if data.calib else count
    last = min(len(pool), first + max(1, (QUICK_TOKENS if spec.quick else FULL_TOKENS) // reader.block_length))
    training = calibration if data.calib else pool.take(range(first, last), (first, last))
    return Texts(pool, count, calibration, training, reader.prompt_length, reader)


def _bench(
    name: str, spec: StudySpec, loaded: LoadedModel, texts: Texts, writer: RunWriter, progress: Progress
) -> Bench:
    return Bench(
        name=name,
        identity=sha256(encode(model_identity(loaded))).hexdigest(),
        loaded=loaded,
        pool=texts.pool.stack(),
        count=texts.count,
        prompt_length=texts.prompt_length,
        sink_tokens=spec.data.sink_tokens,
        scored_sequences=texts.pool.take(range(texts.count), (0, texts.count)),
        calib_sequences=texts.calibration,
        calibration=of_blocks(loaded, texts.calibration, texts.prompt_length, progress),
        trainer=of_blocks(loaded, texts.training, texts.prompt_length, progress, RunCheckpoints(writer)),
        reader=texts.reader,
        cost=loaded.record.step,
        writer=writer,
        progress=progress,
        quick=spec.quick,
        seed=spec.data.seed,
    )


def _names(spec: StudySpec) -> tuple[str, str]:
    """How the model and its counterpart are shown: by the last part of their names where that tells them apart, else
    by whole names, and where those agree too by their parts in the study."""
    model, other = spec.model.name, "" if spec.counterpart is None else spec.counterpart.name
    short, beside = (name.rstrip("/").split("/")[-1] for name in (model, other))
    if short != beside:
        return short, beside
    return (model, other) if model != other else (short, f"{beside}, counterpart")


def _request(
    spec: StudySpec, chosen: tuple[Runner, ...], loaded: LoadedModel, other: LoadedModel | None, texts: Texts
) -> RunRequest:
    records = (
        replace(texts.pool.record, role="quality"),
        replace(texts.calibration.record, role="calibration"),
    )
    return RunRequest(
        kind=RunKind.STUDY,
        identity={
            "asked": {**asked(spec), "model": None, "counterpart": None, "data": data_identity(spec.data)},
            "model": model_identity(loaded),
            "counterpart": None if other is None else model_identity(other),
            "texts": [record.sha256 for record in records],
            **(machine_identity(loaded) if any(runner.timed for runner in chosen) else {}),
        },
        spec=spec,
        model=loaded.record,
        texts=records,
        output=spec.output,
        root=spec.root,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _finished(runner: Runner, bench: Bench) -> Finished:
    """The outcome of an experiment from its shard, or run now and kept there."""
    shard = bench.writer.shard(f"experiment-{runner.of.name}.json")
    if shard.exists():
        bench.progress.note(f"resuming: {runner.of.name} was finished before")
        return decode(shard.read_bytes(), Finished, str(shard))
    bench.progress.note(f"{runner.of.name}: {runner.of.title}")
    try:
        outcome = runner.run(bench)
    except (PlanError, ModelError, DataError) as error:
        outcome = _refused(runner, bench, error)
    rows = tuple(
        replace(row, value=_plain(row.value), low=_plain(row.low), high=_plain(row.high)) for row in outcome.rows
    )
    found = Finished(outcome.record(), rows)
    write_bytes(shard, encode(found))
    return found


def _plain(value: float | None) -> float | None:
    """None in place of what JSON cannot hold."""
    return value if value is None or bool(torch.isfinite(Tensor([value]))) else None


def _refused(runner: Runner, bench: Bench, error: ActsparseError) -> Outcome:
    outcome = Outcome(runner.of, bench.quick, notes=[error.hint])
    outcome.conclude(f"not measured on this model: {error.what}.", ClaimVerdict.UNDECIDED)
    return outcome


def _write(spec: StudySpec, writer: RunWriter, found: list[Finished]) -> None:
    rows = [row for one in found for row in one.rows]
    experiments = tuple(one.experiment for one in found)
    tables.write(writer.path / "studies.parquet", tables.frame(rows, StudyRow))
    write_bytes(writer.path / "studies.json", pretty(experiments).encode())
    summary = {
        "study": spec.study,
        "model": builtins(writer.manifest.model),
        "quick": spec.quick,
        "experiments": builtins(experiments),
        "rows": builtins(rows),
        "warnings": list(writer.warnings),
        "run": str(writer.path),
    }
    write_bytes(writer.path / "summary.json", pretty(summary).encode())
    writer.finish()
