import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_records import MODEL, request

from actsparse.errors import RunError
from actsparse.results import Measure, RunKind
from actsparse.store import files, tables
from actsparse.store.codec import decode
from actsparse.store.run import open_run, read_manifest
from actsparse.store.runs import EvalRun, PlanRun, ProfileRun, open_any

ROWS = [Measure(metric="ppl", value=3.5, unit="", n=7)]
HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def finished(path: Path, **changes) -> Path:
    """A complete run at `path` with a table and a summary."""
    with open_run(request(path, **changes)) as writer:
        assert not writer.complete
        tables.write(path / "measures.parquet", tables.frame(ROWS, Measure))
        files.write_bytes(path / "summary.json", b'{"x": 1}')
        writer.finish()
    return path


def interrupted(path: Path, *, shard: bool = True, **changes) -> Path:
    """A run at `path` that stopped after a table and, with `shard`, after a shard."""
    with open_run(request(path, **changes)) as writer:
        if shard:
            files.write_bytes(writer.shard("state"), b"half")
        files.write_bytes(path / "neurons.parquet", b"old")
    return path


def rewrite(path: Path, **changes) -> None:
    """Change fields of a manifest behind the store's back."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def entries(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")} - {".lock"}


# Rules for an output directory


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_or_empty_directory_becomes_a_run(tmp_path, there):
    path = tmp_path / "deep" / "run"
    if there:
        path.mkdir(parents=True)
    finished(path)
    assert entries(path) == {"manifest.json", "measures.parquet", "summary.json"}
    run = ProfileRun.open(str(path))
    assert run.measures.rows(named=True)[0]["value"] == 3.5
    assert run.summary == {"x": 1}
    assert run.manifest.status == "complete"
    assert [file.path for file in run.manifest.files] == ["measures.parquet", "summary.json"]
    assert run.manifest.model == MODEL
    assert run.manifest.provenance.finished is not None


def test_without_an_output_the_run_is_named_by_model_kind_and_fingerprint(tmp_path):
    asked = request(tmp_path, output=None, root=tmp_path)
    assert asked.directory == tmp_path / "model" / f"profile-{asked.fingerprint[:6]}"


def test_the_same_run_is_up_to_date_and_untouched(tmp_path):
    path = finished(tmp_path / "run")
    before = {name: (path / name).stat().st_mtime_ns for name in entries(path)}
    with open_run(request(path)) as writer:
        assert writer.complete
        assert writer.manifest.status == "complete"
    assert {name: (path / name).stat().st_mtime_ns for name in entries(path)} == before


def test_the_same_unfinished_run_is_resumed_with_its_shards(tmp_path):
    path = interrupted(tmp_path / "run")
    with open_run(request(path)) as writer:
        assert (writer.complete, writer.resumed) == (False, True)
        assert writer.shard("state").read_bytes() == b"half"
        writer.finish()
    assert not (path / "shards").exists()
    assert not (path / "unfinished.json").exists()


def test_no_resume_starts_over(tmp_path):
    path = interrupted(tmp_path / "run")
    with open_run(request(path, resume=False)) as writer:
        assert not writer.resumed
        assert not writer.shard("state").exists()


@pytest.mark.parametrize("before", [finished, interrupted])
def test_another_run_is_refused_with_what_differs_and_how_to_overwrite(tmp_path, before):
    path = before(tmp_path / "run")
    kept = {name: (path / name).read_bytes() for name in entries(path) if (path / name).is_file()}
    with pytest.raises(RunError) as refused, open_run(request(path, asked="cats")):
        pass
    assert "plan: griffin -> cats" in refused.value.what
    assert "limit: " not in refused.value.what
    assert "--force" in refused.value.hint
    assert {name: (path / name).read_bytes() for name in kept} == kept


def test_another_kind_is_another_run(tmp_path):
    path = finished(tmp_path / "run")
    with pytest.raises(RunError, match="kind 'profile', not 'eval'"), open_run(request(path, kind=RunKind.EVAL)):
        pass


@pytest.mark.parametrize("asked", ["griffin", "cats"])
def test_force_starts_over_and_leaves_nothing_of_the_old_run(tmp_path, asked):
    path = finished(tmp_path / "run")
    with open_run(request(path, asked=asked, force=True)) as writer:
        assert not writer.complete
        assert entries(path) == {"unfinished.json"}
        writer.finish()
    assert entries(path) == {"manifest.json"}


def test_force_over_an_interrupted_run_leaves_nothing_of_it_in_the_new_one(tmp_path):
    path = interrupted(tmp_path / "run")
    with open_run(request(path, asked="cats", force=True)) as writer:
        writer.finish()
    assert [file.path for file in read_manifest(path).files] == []


@pytest.mark.parametrize("name", ["manifest.json", "unfinished.json"])
def test_force_gets_past_a_damaged_run_as_its_message_promises(tmp_path, name):
    path = finished(tmp_path / "run") if name == "manifest.json" else interrupted(tmp_path / "run")
    (path / name).write_bytes((path / name).read_bytes()[:50])
    with pytest.raises(RunError, match=name) as refused, open_run(request(path)):
        pass
    assert "--force" in refused.value.hint
    with open_run(request(path, force=True)) as writer:
        writer.finish()
    assert read_manifest(path).status == "complete"


# Files of others


def test_a_directory_with_foreign_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"thesis\.tex"), open_run(request(tmp_path)):
        pass
    assert entries(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize("place", ["notes.txt", "notes/deep.txt", "shards/mine/deep.txt"])
def test_files_laid_beside_a_run_survive_every_force(tmp_path, place):
    path = finished(tmp_path / "run")
    (path / place).parent.mkdir(parents=True, exist_ok=True)
    (path / place).write_text("mine")
    for asked in ("cats", "griffin", "tda"):
        finished(path, asked=asked, force=True)
        assert (path / place).read_text() == "mine"


def test_a_file_laid_beside_a_run_never_becomes_part_of_it(tmp_path):
    path = finished(tmp_path / "run")
    (path / "notes.txt").write_text("mine")
    finished(path, asked="cats", force=True)
    assert "notes.txt" not in {file.path for file in read_manifest(path).files}
    (path / "notes.txt").write_text("edited")
    ProfileRun.open(path)


def test_a_link_in_place_of_a_file_is_not_followed_when_a_run_is_removed(tmp_path):
    path = finished(tmp_path / "run")
    treasure = tmp_path / "treasure.txt"
    treasure.write_text("mine")
    (path / "summary.json").unlink()
    (path / "summary.json").symlink_to(treasure)
    finished(path, asked="cats", force=True)
    assert treasure.read_text() == "mine"


# Locks


def test_a_run_that_another_process_writes_is_refused_and_free_afterwards(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(RunError, match="another process"), open_run(request(path)):
            pass
        assert entries(path) == set()
    finally:
        holder.communicate()
    finished(path)


def test_a_failure_inside_a_run_frees_its_lock_and_keeps_what_is_done(tmp_path):
    path = tmp_path / "run"

    def stopped() -> None:
        with open_run(request(path)) as writer:
            files.write_bytes(writer.shard("state"), b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with open_run(request(path)) as writer:
        assert writer.resumed


# The manifest comes last


def test_until_it_is_finished_a_run_has_no_manifest_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "run"
    with open_run(request(path)):
        files.write_bytes(path / "measures.parquet", b"x")
    assert not (path / "manifest.json").exists()
    with pytest.raises(RunError, match="incomplete") as refused:
        ProfileRun.open(path)
    assert "resume it with: actsparse" in refused.value.hint


def test_the_manifest_is_written_when_everything_it_names_is_there(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    finished(tmp_path / "run")
    assert moved == ["unfinished.json", "measures.parquet", "summary.json", "manifest.json"]


def test_warnings_are_kept_once_and_in_order(tmp_path):
    with open_run(request(tmp_path / "run")) as writer:
        for text in ("b", "a", "b"):
            writer.warn(text)
        writer.finish()
    assert ProfileRun.open(tmp_path / "run").warnings == ("b", "a")


# Reading what is not right


@pytest.mark.parametrize("reader", [ProfileRun.open, read_manifest, open_any])
def test_what_is_no_run_is_said(tmp_path, reader):
    with pytest.raises(RunError, match="there is no run at"):
        reader(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        reader(tmp_path / "file")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        reader(tmp_path)


def test_a_run_of_another_kind_is_refused_by_name(tmp_path):
    path = finished(tmp_path / "run", kind=RunKind.EVAL)
    with pytest.raises(RunError, match="kind 'eval', not 'profile'"):
        ProfileRun.open(path)
    assert isinstance(open_any(path), EvalRun)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"kind": "profile"}', b"[" * 10**5]
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    path = finished(tmp_path / "run")
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match=r"manifest\.json"):
        ProfileRun.open(path)


def test_a_manifest_of_another_schema_version_is_refused(tmp_path):
    path = finished(tmp_path / "run")
    rewrite(path, schema_version=99)
    with pytest.raises(RunError, match="version"):
        ProfileRun.open(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "directory"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = finished(tmp_path / "run")
    table = path / "measures.parquet"
    data = table.read_bytes()
    table.unlink()
    if damage == "directory":
        table.mkdir()
    elif damage != "gone":
        table.write_bytes(data[:-20] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunError, match=r"measures\.parquet"):
        ProfileRun.open(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "link", "door/secret"])
def test_a_manifest_that_names_a_file_outside_its_run_is_refused(tmp_path, name):
    path = finished(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    for secret in (tmp_path / "secret", outside / "secret"):
        secret.write_text("s")
    (path / "link").symlink_to(tmp_path / "secret")
    (path / "door").symlink_to(outside)
    digest = files.sha256_of(tmp_path / "secret")
    rewrite(path, files=[{"path": name, "bytes": 1, "sha256": digest}])
    with pytest.raises(RunError, match="outside"):
        ProfileRun.open(path)


def test_force_over_a_hostile_manifest_deletes_nothing_outside(tmp_path):
    path = finished(tmp_path / "run")
    (tmp_path / "secret").write_text("s")
    rewrite(path, files=[{"path": "../secret", "bytes": 1, "sha256": ""}, {"path": "..", "bytes": 1, "sha256": ""}])
    finished(path, asked="cats", force=True)
    assert (tmp_path / "secret").exists()


@pytest.mark.parametrize(
    ("kind", "opened", "attribute"),
    [
        (RunKind.PROFILE, ProfileRun, "summary"),
        (RunKind.PROFILE, ProfileRun, "neurons"),
        (RunKind.PROFILE, ProfileRun, "histograms"),
        (RunKind.PLAN, PlanRun, "plan"),
        (RunKind.EVAL, EvalRun, "generations"),
    ],
)
def test_a_complete_run_without_a_file_of_its_kind_is_a_clear_error(tmp_path, kind, opened, attribute):
    with open_run(request(tmp_path / "run", kind=kind)) as writer:
        writer.finish()
    run = opened.open(tmp_path / "run")
    with pytest.raises(RunError, match="missing"):
        getattr(run, attribute)


# A disk that refuses


def refuse(code: int):
    def failing(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return failing


REFUSALS = [(errno.ENOSPC, "no disk space"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be written")]


@pytest.mark.parametrize(("code", "said"), REFUSALS)
def test_a_disk_that_refuses_the_manifest_leaves_the_run_unfinished_and_resumable(tmp_path, monkeypatch, code, said):
    path = tmp_path / "run"
    with open_run(request(path)) as writer:
        files.write_bytes(writer.shard("state"), b"half")
        with monkeypatch.context() as disk:
            disk.setattr(os, "replace", refuse(code))
            with pytest.raises(RunError, match=said) as refused:
                writer.finish()
    assert "--output" in refused.value.hint
    assert entries(path) == {"unfinished.json", "shards", "shards/state", "shards/sums"}
    with open_run(request(path)) as writer:
        assert writer.resumed


@pytest.mark.parametrize(("code", "said"), REFUSALS)
def test_a_place_that_cannot_be_made_or_locked_is_said(tmp_path, monkeypatch, code, said):
    with monkeypatch.context() as disk:
        disk.setattr(Path, "mkdir", refuse(code))
        with pytest.raises(RunError, match=said), open_run(request(tmp_path / "run")):
            pass
    with monkeypatch.context() as disk:
        disk.setattr("actsparse.store.run.FileLock.acquire", refuse(code))
        with pytest.raises(RunError, match=said), open_run(request(tmp_path / "other")):
            pass
    assert decode(b"[]", list, "x") == []
