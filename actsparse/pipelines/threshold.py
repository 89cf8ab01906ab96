"""`threshold`: derive a plan from a profile; its tables where they suffice, its model and text again where not."""

from dataclasses import replace
from typing import Any

import msgspec
import torch

from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.errors import PlanError
from actsparse.methods.plan import Plan, fit_plan, to_record
from actsparse.methods.short import ShortForm, parse
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.calibration import Replay, Statistics, TextCalibration, widths_of
from actsparse.pipelines.identity import model_identity
from actsparse.pipelines.progress import Progress, Silent, describe
from actsparse.pipelines.training import RunCheckpoints
from actsparse.results import ModelRecord, RunKind, TextRecord
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store import tensors
from actsparse.store.codec import builtins, pretty
from actsparse.store.files import write_bytes
from actsparse.store.run import RunRequest, RunWriter, open_run
from actsparse.store.runs import PlanRun, ProfileRun


def threshold(spec: ThresholdSpec, progress: Progress | None = None) -> PlanRun:
    """The plan that `spec` asks for, as a complete run, new or up to date.

    Raises ActsparseError where profile, method or budget do not go together.
    """
    progress = progress or Silent()
    run = ProfileRun.open(spec.run)
    model = run.manifest.model
    assert model is not None
    short = _with_amount(spec)
    short.method.check(model.gated)
    with open_run(_request(spec, short, run, model)) as writer:
        if writer.complete:
            progress.note(f"{writer.path} is up to date")
        else:
            _fit_and_write(spec, short, run, model, writer, progress)
    return PlanRun.open(writer.path)


def _with_amount(spec: ThresholdSpec) -> ShortForm:
    """The plan as typed, with --sparsity or --target-error in place of its own amount."""
    text = spec.plan
    if spec.sparsity is not None and spec.target_error is not None:
        raise PlanError("both --sparsity and --target-error are given", "give one of the two")
    if spec.sparsity is None and spec.target_error is None:
        return parse(text)
    if "@" in text:
        raise PlanError(f"'{text}' names a share already", "leave out @x, or --sparsity and --target-error")
    if spec.sparsity is not None:
        return parse(f"{text}@{spec.sparsity:g}")
    return parse(f"{text}{',' if ':' in text else ':'}target_error={spec.target_error:g}")


def _request(spec: ThresholdSpec, short: ShortForm, run: ProfileRun, model: ModelRecord) -> RunRequest:
    return RunRequest(
        kind=RunKind.PLAN,
        identity={"plan": short.text, "profile": run.manifest.fingerprint},
        spec=spec,
        model=model,
        texts=run.manifest.texts,
        output=spec.output,
        root=spec.root,
        device=spec.device,
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _fit_and_write(
    spec: ThresholdSpec, short: ShortForm, run: ProfileRun, model: ModelRecord, writer: RunWriter, progress: Progress
) -> None:
    calibration, text = run.manifest.texts[0], run.manifest.texts[0]
    if short.method.needs_replay:
        progress.note(f"{short.method.name} needs more than the profile's tables: loading {model.resolved} again")
        loaded = _reload(run, spec, progress)
        progress.detail(describe(loaded.record, str(loaded.device)))
        blocks, prompt_length = _blocks(run, loaded, progress)
        text = blocks.record
        source = TextCalibration(
            widths_of(model),
            lambda: Statistics.of_run(run),
            lambda: Replay.of(loaded, blocks, prompt_length, progress),
            RunCheckpoints(writer),
        )
    else:
        source = TextCalibration(widths_of(model), lambda: Statistics.of_run(run), _no_replay)
    plans = fit_plan(short, source, model.step, gated=model.gated)
    plan = plans[0]
    if len(plans) > 1:
        progress.note(f"{short.text} is three seeds in an evaluation; a plan directory holds one: seed 0")
    _write(plan, model, replace(text, role="calibration"), calibration, writer)


def _write(plan: Plan, model: ModelRecord, text: TextRecord, profiled: TextRecord, writer: RunWriter) -> None:
    record = to_record(plan, model, text)
    write_bytes(writer.path / "plan.json", pretty(record).encode())
    tensors.write(writer.path / "plan.safetensors", plan.fit.tensors)
    document: dict[str, Any] = builtins(record)
    document["calibration"] = {k: v for k, v in document["calibration"].items() if k != "window_hashes"}
    summary = {
        "plan": {key: document[key] for key in ("method", "short", "options", "amount", "target", "layers")},
        "model": document["model"],
        "predicted": document["predicted"],
        "realised": document["realised"],
        "calibration": document["calibration"],
        "profile_text": profiled.sha256,
        "warnings": list(writer.warnings),
        "run": str(writer.path),
    }
    write_bytes(writer.path / "summary.json", pretty(summary).encode())
    writer.finish()


def _reload(run: ProfileRun, spec: ThresholdSpec, progress: Progress) -> LoadedModel:
    """The model of a profile, as it was then; raises PlanError where its content has changed since."""
    asked = _profile_spec(run).model
    loaded = load(replace(asked, dtype=_dtype_of(run), device=spec.device, offline=spec.offline), progress.note)
    if model_identity(loaded) != run.manifest.identity["model"]:
        raise PlanError(
            f"the model {asked.name} is not the one that was profiled: its files have changed",
            "profile it again: actsparse profile --model " + asked.name,
        )
    return loaded


def _dtype_of(run: ProfileRun) -> str:
    """The dtype that the profile computed in, whatever `auto` would mean on this device."""
    assert run.manifest.model is not None
    return run.manifest.model.dtype


def _blocks(run: ProfileRun, loaded: LoadedModel, progress: Progress) -> tuple[Sequences, int]:
    """The profile's text as blocks, and their prompt length; raises PlanError where the text has changed since."""
    data = _profile_spec(run).data
    reader = TextReader(data, loaded.tokenizer, loaded.record.max_positions, progress.note)
    if reader.profile_sequences().record.sha256 != run.manifest.texts[0].sha256:
        raise PlanError("the profile's text has changed since it was profiled", "profile the new text")
    return reader.calibration_blocks(), reader.prompt_length


def _profile_spec(run: ProfileRun) -> ProfileSpec:
    spec = dict(run.manifest.spec)
    return ProfileSpec(model=msgspec.convert(spec["model"], ModelSpec), data=msgspec.convert(spec["data"], DataSpec))


def _no_replay() -> Replay:
    raise PlanError("this method did not ask for a replay", "this is a defect of the method: set needs_replay")
