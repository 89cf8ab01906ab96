"""`evaluate`: quality of plans against dense in the decode regime, and real sparse generation with its timing."""

from functools import partial
from typing import Any

import polars as pl
import torch

from actsparse.data.network import network
from actsparse.data.tasks import Task
from actsparse.data.texts import EvalTexts, TextReader
from actsparse.engine.timing import read_bandwidth
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines import eval_tables
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.free_running import along_dense_text, free_rows
from actsparse.pipelines.halving import fitting
from actsparse.pipelines.identity import data_identity, device_name, machine_identity, model_identity
from actsparse.pipelines.plans import (
    PlanGroup,
    build,
    calibration_warnings,
    check_names,
    controls_of,
    identity_of,
    needs_text,
    prompt_warnings,
)
from actsparse.pipelines.progress import Progress, Silent, describe
from actsparse.pipelines.quality import score_blocks
from actsparse.pipelines.session import Session
from actsparse.pipelines.speed import Speeds, measure_all
from actsparse.pipelines.task_tables import task_rows
from actsparse.pipelines.tasks import read_tasks, score_all_tasks, tasks_identity
from actsparse.pipelines.throughput import measure_throughput
from actsparse.pipelines.training import RunCheckpoints
from actsparse.results import EvalRow, RunKind, ThroughputRow, TimingRow
from actsparse.specs import EvalSpec
from actsparse.store import tables
from actsparse.store.codec import builtins, encode, pretty
from actsparse.store.files import write_bytes
from actsparse.store.fingerprint import asked
from actsparse.store.run import RunRequest, open_run
from actsparse.store.runs import EvalRun


def evaluate(spec: EvalSpec, progress: Progress | None = None) -> EvalRun:
    """Measure every plan of `spec` against dense; returns the complete run, new or up to date.

    Raises ActsparseError where model, plans, text or output cannot be used as asked.
    """
    with network(offline=spec.model.offline):
        return _evaluated(spec, progress or Silent())


def _evaluated(spec: EvalSpec, progress: Progress) -> EvalRun:
    names = check_names(spec.plans)
    tasks = read_tasks(spec)
    loaded = load(spec.model, progress.note)
    progress.detail(describe(loaded.record, str(loaded.device)))
    reader = TextReader(spec.data, loaded.tokenizer, loaded.record.max_positions, progress.note)
    texts = reader.eval_texts(fitted=spec.controls or spec.data.calib_blocks is not None or needs_text(names))
    with open_run(_request(spec, names, loaded, texts, tasks)) as writer, fitting():
        if writer.complete:
            progress.note(f"{writer.path} is up to date")
        else:
            _measure(Session(spec, loaded, texts, loaded.record.step, writer, progress), names, tasks)
    return EvalRun.open(writer.path)


def _request(spec: EvalSpec, names: list[str], loaded: LoadedModel, texts: EvalTexts, tasks: list[Task]) -> RunRequest:
    return RunRequest(
        kind=RunKind.EVAL,
        identity={
            "asked": {
                **asked(spec),
                "model": None,
                "data": data_identity(spec.data),
                "plans": [identity_of(name) for name in names],
                **tasks_identity(spec, tasks),
            },
            "model": model_identity(loaded),
            "texts": [text.record.sha256 for text in (texts.quality, texts.calibration, texts.prompts)],
            **machine_identity(loaded),
        },
        spec=spec,
        model=loaded.record,
        texts=(texts.quality.record, texts.calibration.record, texts.prompts.record),
        output=spec.output,
        root=spec.root,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _measure(session: Session, names: list[str], tasks: list[Task]) -> None:
    loaded, texts = session.loaded, session.texts
    calibration = of_blocks(
        loaded, texts.calibration, texts.prompt_length, session.progress, RunCheckpoints(session.writer)
    )
    groups = build(names, loaded, calibration, session.cost)
    for text in calibration_warnings(groups, texts.calibration.record, texts.quality.record):
        session.warn(text)
    for text in prompt_warnings(groups, texts.prompt_length, texts.quality.record.sink_tokens):
        session.warn(text)
    score = partial(
        score_blocks, loaded, blocks=texts.quality, prompt_length=texts.prompt_length, writer=session.writer,
        progress=session.progress,
    )  # fmt: skip
    tokens, layers = score(groups)
    if session.spec.controls:
        # what a plan drops is known once it was scored; its own passes are kept, and not repeated
        dropped = {group.name: eval_tables.realised_of(group, layers, session.cost) for group in groups}
        groups += controls_of(groups, dropped, loaded, calibration, session.cost)
        tokens, layers = score(groups)
    for text in eval_tables.not_finite(tokens):
        session.warn(text)
    items = score_all_tasks(session, groups, tasks)
    speeds = measure_all(session, groups)
    speeds = along_dense_text(session, groups, speeds)
    seed = session.spec.data.seed
    rows = eval_tables.result_rows(groups, tokens, layers, session.cost, speeds, seed)
    rows += free_rows(speeds, seed) + task_rows(items, seed)
    if session.spec.throughput:
        bandwidth = speeds.dense.read_bandwidth or read_bandwidth(loaded.device)
        found = measure_throughput(session, groups, bandwidth)
        tables.write(session.writer.path / "throughput.parquet", tables.frame(found, ThroughputRow))
    _write(session, groups, rows, tokens, items, speeds)


def _write(
    session: Session,
    groups: list[PlanGroup],
    rows: list[EvalRow],
    tokens: pl.DataFrame,
    items: pl.DataFrame,
    speeds: Speeds,
) -> None:
    path = session.writer.path
    laps = [lap for one in speeds.all for lap in one.laps]
    generations = [sample for one in speeds.all for sample in one.generations]
    tables.write(path / "results.parquet", tables.frame(rows, EvalRow))
    tables.write(path / "tokens.parquet", tokens)
    if items.height:
        tables.write(path / "items.parquet", items)
    tables.write(path / "timing.parquet", tables.frame(laps, TimingRow))
    write_bytes(path / "generations.jsonl", b"".join(encode(one) + b"\n" for one in generations))
    write_bytes(path / "vocabulary.json", pretty(_vocabulary(session, tokens)).encode())
    summary = eval_tables.summary(
        model=builtins(session.loaded.record),
        data=builtins(_without_windows(session)),
        device=_device(session.loaded),
        groups=groups,
        rows=rows,
        speeds=speeds,
        warnings=list(session.writer.warnings),
        run=str(path),
    )
    write_bytes(path / "summary.json", pretty(summary).encode())
    session.writer.finish()


def _vocabulary(session: Session, tokens: pl.DataFrame) -> dict[str, str]:
    """The text of every token id that `tokens.parquet` names."""
    tokenizer = session.loaded.tokenizer
    return {str(token): str(tokenizer.decode([token])) for token in tokens["token"].unique().sort().to_list()}


def _without_windows(session: Session) -> dict[str, Any]:
    """The three texts by role, without the hashes that only a comparison needs."""
    texts = (session.texts.quality, session.texts.calibration, session.texts.prompts)
    return {
        text.record.role: {key: v for key, v in builtins(text.record).items() if key != "window_hashes"}
        for text in texts
    }


def _device(loaded: LoadedModel) -> dict[str, Any]:
    return {"name": device_name(loaded), "device": str(loaded.device), "threads": torch.get_num_threads()}
