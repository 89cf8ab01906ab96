"""`threshold`: derive a plan from a profile; its tables where they suffice, its model and text again where not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actsparse.core.cost import saved
from actsparse.data.network import network
from actsparse.data.sequences import Sequences, shares_text
from actsparse.errors import PlanError
from actsparse.methods.plan import Plan, drops_of, fit_plan, to_record
from actsparse.methods.short import ShortForm
from actsparse.pipelines.export import export_plan
from actsparse.pipelines.halving import fitting
from actsparse.pipelines.probing import probe
from actsparse.pipelines.profiled import Profiled
from actsparse.pipelines.progress import Progress, Silent
from actsparse.pipelines.targets import asked_form, solve, target_of
from actsparse.pipelines.training import RunCheckpoints
from actsparse.results import MeasuredLayer, MeasuredPlan, RunKind, TextRecord, ThresholdPlan
from actsparse.specs import ThresholdSpec
from actsparse.store import tensors
from actsparse.store.codec import builtins, pretty
from actsparse.store.files import sha256_of, write_bytes
from actsparse.store.run import RunRequest, RunWriter, open_run
from actsparse.store.runs import PlanRun, ProfileRun


def threshold(spec: ThresholdSpec, progress: Progress | None = None) -> PlanRun:
    """The plan that `spec` asks for, as a complete run, new or up to date; exported where that is asked for.

    Raises ActsparseError where profile, method, target or export do not go together.
    """
    with network(offline=spec.offline):
        return _derived(spec, progress or Silent())


def _derived(spec: ThresholdSpec, progress: Progress) -> PlanRun:
    run = ProfileRun.open(spec.run)
    short = asked_form(spec)
    profiled = Profiled(run, spec, short, progress)
    short.method.check(profiled.model.gated)
    short.method.check_experts(profiled.model.ffns)
    with open_run(_request(spec, short, profiled)) as writer, fitting():
        if writer.complete:
            progress.note(f"{writer.path} is up to date")
        else:
            _fit_and_write(spec, short, profiled, writer, progress)
    plan = PlanRun.open(writer.path)
    if spec.export is not None:
        export_plan(plan, profiled, spec.export, force=spec.force, progress=progress)
    return plan


def _request(spec: ThresholdSpec, short: ShortForm, profiled: Profiled) -> RunRequest:
    target, manifest = target_of(spec), profiled.run.manifest
    files = {str(path): _sha256(path) for path in short.method.files}
    identity: dict[str, Any] = {"plan": short.text, "profile": manifest.fingerprint}
    identity |= {"target": target.text} if target else {}
    identity |= {"files": files} if files else {}
    identity |= {"transfer": _sha256(Path(spec.transfer).expanduser())} if spec.transfer else {}
    return RunRequest(
        kind=RunKind.PLAN,
        identity=identity,
        spec=spec,
        model=manifest.model,
        texts=manifest.texts,
        output=spec.output,
        root=spec.root,
        device=spec.device,
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise PlanError(f"there is no file {path}", "check the path")
    return sha256_of(path)


def _fit_and_write(
    spec: ThresholdSpec, short: ShortForm, profiled: Profiled, writer: RunWriter, progress: Progress
) -> None:
    source, step, gated = profiled.calibration(RunCheckpoints(writer)), profiled.model.step, profiled.model.gated

    def fit(form: ShortForm) -> Plan:
        return fit_plan(form, source, step, gated=gated)[0]

    target = target_of(spec)
    plan = solve(target, spec, profiled, fit, progress) if target else fit(short)
    if len(short.method.replicas()) > 1:
        progress.note(f"{plan.name} is three seeds in an evaluation; a plan directory holds one: seed 0")
    if plan.predicted.model_bytes_frac < 0:
        _warn(f"{plan.name}: its rules read more bytes than they save", writer, progress)
    measured = _measured(plan, spec, profiled, writer, progress)
    if plan.realised is None and measured:
        plan = replace(plan, realised=measured[0].realised)
    calibration = profiled.run.manifest.texts[0]
    text = profiled.blocks.record if profiled.was_loaded else calibration
    record = replace(to_record(plan, profiled.model, replace(text, role="calibration")), measured=measured)
    _write(record, plan, calibration, writer)


def _measured(
    plan: Plan, spec: ThresholdSpec, profiled: Profiled, writer: RunWriter, progress: Progress
) -> tuple[MeasuredPlan, ...]:
    """What the plan does to calibration blocks and to the transfer text; nothing where neither needs to be run."""
    if spec.transfer is None and not (profiled.was_loaded and plan.realised is None):
        return ()
    texts = [profiled.blocks]
    if spec.transfer is not None:
        texts.append(profiled.transfer_blocks(spec.transfer))
        if shares_text(texts[0].record, texts[1].record):
            _warn(f"the transfer text ({spec.transfer}) overlaps the calibration text", writer, progress)
    return tuple(measure_plan(plan, profiled, blocks, progress) for blocks in texts)


def measure_plan(plan: Plan, profiled: Profiled, blocks: Sequences, progress: Progress) -> MeasuredPlan:
    """Sparsity and local errors of a plan at positions P..S-1 of blocks, on dense activations."""
    gates = plan.gates()
    role = "transfer" if blocks.record.role == "transfer" else "calibration"
    what = f"measuring the plan on {role} text"
    found = probe(profiled.loaded, gates, blocks, profiled.prompt_length, what, progress)
    layers = tuple(
        MeasuredLayer(layer=layer, unit=unit, dropped=1 - tally.kept_frac, rel_err=tally.mean_error)
        for (unit, layer), tally in sorted(
            found.by_layer(profiled.loaded.sites).items(), key=lambda item: (item[0][1], item[0][0])
        )
    )
    dropped = {(one.unit, one.layer): one.dropped for one in layers}
    return MeasuredPlan(
        text=replace(blocks.record, role=role, window_hashes=()),
        realised=saved(profiled.model.step, drops_of(plan.layer_gates(), dropped, gated=profiled.model.gated)),
        rel_err=sum(one.rel_err for one in layers) / max(1, len(layers)),
        layers=layers,
    )


def _warn(text: str, writer: RunWriter, progress: Progress) -> None:
    writer.warn(text)
    progress.warn(text)


def _write(record: ThresholdPlan, plan: Plan, profiled: TextRecord, writer: RunWriter) -> None:
    write_bytes(writer.path / "plan.json", pretty(record).encode())
    tensors.write(writer.path / "plan.safetensors", plan.fit.tensors)
    document: dict[str, Any] = builtins(record)
    document["calibration"] = {k: v for k, v in document["calibration"].items() if k != "window_hashes"}
    summary = {
        "plan": {key: document[key] for key in ("method", "short", "options", "amount", "target", "ideal", "layers")},
        "model": document["model"],
        "predicted": document["predicted"],
        "realised": document["realised"],
        "measured": document["measured"],
        "calibration": document["calibration"],
        "profile_text": profiled.sha256,
        "warnings": list(writer.warnings),
        "run": str(writer.path),
    }
    write_bytes(writer.path / "summary.json", pretty(summary).encode())
    writer.finish()
