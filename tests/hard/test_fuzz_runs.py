"""Manifests, plans, tables and tensors that were changed behind the store's back: only errors of ours come out."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from fuzzing import fuzzed, mutated_bytes, mutated_json, only_ours
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from actsparse.errors import PlanError, RunError
from actsparse.methods.plan import check_layers, from_record
from actsparse.models.load import LoadedModel, load
from actsparse.models.sites import unit_widths
from actsparse.pipelines.profile import profile
from actsparse.pipelines.threshold import threshold
from actsparse.report.view import build_view
from actsparse.results import Measure, ThresholdPlan
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec, ReportSpec, ThresholdSpec
from actsparse.store import arrays, tables, tensors
from actsparse.store.codec import MAX_JSON_BYTES, decode
from actsparse.store.files import sha256_of
from actsparse.store.run import read_manifest
from actsparse.store.runs import ProfileRun, open_any

PLANS = ("griffin@0.5", "cats@0.5", "static@0.5", "teal@0.4", "tda@0.5", "wina@0.4")


@pytest.fixture(scope="module")
def profiled(tiny_folder: Callable, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),), block_length=32, prompt_length=12),
        output=tmp_path_factory.mktemp("runs") / "profile",
    )
    return profile(spec).path


@pytest.fixture(scope="module")
def plans(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("plans")
    return [
        threshold(ThresholdSpec(run=profiled, plan=plan, device="cpu", output=folder / plan)).path for plan in PLANS
    ]


@pytest.fixture(scope="module")
def loaded(tiny_loaded: Callable) -> LoadedModel:
    return tiny_loaded("llama")


@contextmanager
def soon() -> Iterator[None]:
    """What would read for ever, as from a pipe or a device, fails instead."""

    def late(*_: object) -> None:
        pytest.fail("still reading after 5 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def relisted(run: Path) -> None:
    """Let the manifest name the files as they are now, as one who wants them read would."""
    manifest = json.loads((run / "manifest.json").read_bytes())
    for file in manifest["files"]:
        path = run / file["path"]
        file |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (run / "manifest.json").write_text(json.dumps(manifest))


@fuzzed(60)
@given(draws=st.data())
def test_manifests(profiled: Path, draws: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("m") / "run"
    shutil.copytree(profiled, run)
    whole = (profiled / "manifest.json").read_bytes()
    (run / "manifest.json").write_bytes(draws.draw(mutated_json(json.loads(whole)) | mutated_bytes(whole)))
    only_ours(read_manifest, run)
    only_ours(open_any, run)
    shutil.rmtree(run)


@fuzzed(15)
@given(draws=st.data())
def test_reports_of_changed_runs(
    profiled: Path, draws: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("r") / "run"
    shutil.copytree(profiled, run)
    name = draws.draw(st.sampled_from(["manifest.json", "summary.json"]))
    (run / name).write_bytes(draws.draw(mutated_json(json.loads((run / name).read_bytes()))))
    with suppress(KeyError, TypeError, ValueError, AttributeError, OSError):  # the manifest may be what was changed
        relisted(run)
    only_ours(build_view, ReportSpec(runs=(run,), output=run / "r.html"))
    shutil.rmtree(run)


def use(run: Path, loaded: LoadedModel) -> None:
    """A stored plan as `evaluate` takes it up."""
    record = decode((run / "plan.json").read_bytes(), ThresholdPlan, "plan.json")
    plan = from_record(record, tensors.read(run / "plan.safetensors"), "p")
    check_layers(plan, loaded.record.layers, unit_widths(loaded.sites))


@fuzzed(80)
@given(draws=st.data())
def test_plan_records(plans: list[Path], loaded: LoadedModel, draws: st.DataObject, tmp_path_factory: Any) -> None:
    run = tmp_path_factory.mktemp("p")
    source = draws.draw(st.sampled_from(plans))
    document = json.loads((source / "plan.json").read_bytes())
    (run / "plan.json").write_bytes(draws.draw(mutated_json(document)))
    shutil.copy(source / "plan.safetensors", run)
    only_ours(use, run, loaded)


@fuzzed(80)
@given(draws=st.data())
def test_plan_tensors_of_another_shape_or_type(
    plans: list[Path], loaded: LoadedModel, draws: st.DataObject, tmp_path_factory: Any
) -> None:
    run = tmp_path_factory.mktemp("p")
    source = draws.draw(st.sampled_from([plan for plan in plans if load_file(plan / "plan.safetensors")]))
    held = load_file(source / "plan.safetensors")
    name = draws.draw(st.sampled_from(sorted(held)))
    kinds = [torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8]
    shape = draws.draw(st.lists(st.integers(0, 5), max_size=3))
    other = torch.zeros(shape, dtype=draws.draw(st.sampled_from(kinds)))
    if draws.draw(st.booleans()):
        del held[name]
    else:
        held[name] = other
    shutil.copy(source / "plan.json", run)
    save_file(held, run / "plan.safetensors")
    only_ours(use, run, loaded)


def test_a_mask_of_another_width_or_type_is_refused(plans: list[Path], loaded: LoadedModel, tmp_path: Path) -> None:
    source = next(plan for plan in plans if plan.name.startswith("static"))
    held = load_file(source / "plan.safetensors")
    shutil.copy(source / "plan.json", tmp_path)
    for wrong in (torch.ones(7, dtype=torch.bool), torch.ones(48), torch.ones(48, 2, dtype=torch.bool)):
        save_file(held | {"layers.1.mask": wrong}, tmp_path / "plan.safetensors")
        with pytest.raises(PlanError, match="cannot be used"):
            use(tmp_path, loaded)
    save_file(held, tmp_path / "plan.safetensors")
    use(tmp_path, loaded)


def test_nan_in_a_plan_is_refused(plans: list[Path], loaded: LoadedModel, tmp_path: Path) -> None:
    source = next(plan for plan in plans if plan.name.startswith("wina"))
    held = load_file(source / "plan.safetensors")
    name = next(key for key, value in held.items() if value.is_floating_point())
    held[name] = torch.full_like(held[name], torch.nan)
    shutil.copy(source / "plan.json", tmp_path)
    save_file(held, tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="NaN"):
        use(tmp_path, loaded)


@fuzzed(60)
@given(draws=st.data())
def test_damaged_tables_and_tensors(profiled: Path, draws: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("d")
    name = draws.draw(st.sampled_from(["measures.parquet", "histograms.safetensors", "reservoir.safetensors"]))
    data = draws.draw(mutated_bytes((profiled / name).read_bytes()))
    (folder / name).write_bytes(data)
    readers = [lambda path: tables.read(path, Measure)] if name.endswith("parquet") else [tensors.read, arrays.read]
    for reader in readers:
        only_ours(reader, folder / name)


@fuzzed(25)
@given(draws=st.data())
def test_configurations_of_models(tiny_folder: Callable, draws: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("c") / "model"
    family = draws.draw(st.sampled_from(["llama", "gpt2", "mixtral"]))
    shutil.copytree(tiny_folder(family), folder)
    document = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(draws.draw(mutated_json(document)))
    only_ours(load, ModelSpec(name=str(folder), device="cpu"))
    shutil.rmtree(folder)


def test_a_table_that_unpacks_into_far_too_many_rows_is_refused(tmp_path: Path) -> None:
    rows = pl.DataFrame({"plan": ["x"] * 3_000_000})
    rows.write_parquet(tmp_path / "bomb.parquet", statistics=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(RunError, match="3,000,000 rows"):
        tables.read(tmp_path / "bomb.parquet", Measure)


@pytest.mark.parametrize("name", [".lock", "manifest.json", "unfinished.json", "shards"])
def test_links_in_a_run_directory_are_not_followed_out(
    name: str, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    (outside / "deep").mkdir(parents=True)
    target = outside / "deep" if name == "shards" else outside / "file"
    if name != "shards":
        target.write_text("mine")
    (run / name).symlink_to(target)
    spec = ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),)), probes=(), output=run, force=True,
    )  # fmt: skip
    with pytest.raises(RunError, match="symbolic link"):
        profile(spec)
    assert list((outside / "deep").iterdir()) == []
    assert not (outside / "file").exists() or (outside / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "large"])
@pytest.mark.parametrize("name", ["manifest.json", "unfinished.json"])
def test_a_manifest_that_is_no_plain_file_is_refused_before_it_is_read(
    name: str, kind: str, profiled: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    (run / "manifest.json").rename(tmp_path / "other.json")
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "large":
        with (run / name).open("wb") as file:
            file.truncate(MAX_JSON_BYTES + 1)
    else:
        (run / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "other.json")
    said = "more than any run writes" if kind == "large" else "no file that a run wrote"
    with soon(), pytest.raises(RunError, match=said):
        open_any(run)
    with soon(), pytest.raises(RunError, match=said):
        build_view(ReportSpec(runs=(run,)))
    with soon(), pytest.raises(RunError, match=said):
        threshold(ThresholdSpec(run=run, plan="cats@0.5", device="cpu", output=tmp_path / "plan"))


def test_a_document_of_a_run_that_is_too_large_is_refused(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ProfileRun.open(Path(shutil.copytree(profiled, tmp_path / "run")))
    monkeypatch.setattr("actsparse.store.runs.MAX_JSON_BYTES", 10)
    with pytest.raises(RunError, match="more than any run writes"):
        _ = run.summary


def test_a_file_that_the_manifest_does_not_name_is_not_read(profiled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != "measures.parquet"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"measures\.parquet is missing"):
        _ = ProfileRun.open(run).measures


def test_a_manifest_that_calls_itself_unfinished_is_no_run(profiled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_bytes())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "unfinished"}))
    with pytest.raises(RunError, match="says that the run is unfinished"):
        ProfileRun.open(run)
