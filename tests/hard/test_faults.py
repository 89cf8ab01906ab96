"""Disks, memory, clocks and signals that fail a command: what is said, and that nothing finished is lost."""

import os
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from processes import Zygote

from actsparse.cli.app import main
from actsparse.models.home import file_sha256
from actsparse.pipelines import recording
from actsparse.pipelines.profile import profile
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store import provenance
from actsparse.store.runs import ProfileRun


@pytest.fixture
def command(tiny_folder: Callable, prompts_file: Path) -> list[str]:
    return ["profile", "--model", str(tiny_folder("llama")), "--device", "cpu", "--prompts", str(prompts_file),
            "--batch-size", "2", "--probes", "none", "-q"]  # fmt: skip


def spec(tiny_folder: Callable, prompts_file: Path, output: Path, **changes: object) -> ProfileSpec:
    return ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),)),
        output=output,
        probes=(),
        **changes,  # pyright: ignore[reportArgumentType]
    )


def refused(capsys: pytest.CaptureFixture[str], said: str) -> None:
    found = capsys.readouterr()
    assert said in found.err
    assert "hint:" in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


# Disks


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    command: list[str],
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "CHECKPOINT_SECONDS", -1.0)
    subprocess.run(["mount", "-o", "remount,size=160k", str(small_disk)], check=True)
    command = [*command, "-o", str(small_disk / "run")]
    assert main(command) == 1
    refused(capsys, "no disk space left")
    assert not (small_disk / "run" / "manifest.json").exists()
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(command) == 0
    assert main([*command[:-1], str(tmp_path / "whole")]) == 0
    run, whole = ProfileRun.open(small_disk / "run"), ProfileRun.open(tmp_path / "whole")
    assert run.all_measures.equals(whole.all_measures)
    assert run.neurons.equals(whole.neurons)


@pytest.mark.parametrize("there", [False, True])
def test_a_read_only_place_is_said(
    command: list[str], small_disk: Path, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if there:
        (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main([*command, "-o", str(small_disk / "run")]) == 1
    refused(capsys, "cannot be written: Read-only file system")
    assert main(["report", str(small_disk / "run"), "-o", str(small_disk / "r.html")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_read_only_home_costs_the_memory_of_hashes_and_nothing_else(
    tiny_folder: Callable, prompts_file: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setenv("ACTSPARSE_HOME", str(small_disk / "home"))
    assert profile(spec(tiny_folder, prompts_file, tmp_path / "run")).measures.height


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "link"])
def test_a_shard_that_was_damaged_is_made_again_and_said(
    damage: str, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile(spec(tiny_folder, prompts_file, tmp_path / "whole", batch_size=2))
    monkeypatch.setattr(recording, "CHECKPOINT_SECONDS", -1.0)
    record, left = recording.Recorder.record, iter(range(3))

    def failing(self: recording.Recorder, batch: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        record(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(recording.Recorder, "record", failing)
    asked = spec(tiny_folder, prompts_file, tmp_path / "run", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        profile(asked)
    monkeypatch.setattr(recording.Recorder, "record", record)
    shard = tmp_path / "run" / "shards" / "prefill-0.safetensors"
    data = bytearray(shard.read_bytes())
    shard.unlink()
    data[-7] ^= 4
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        shard.symlink_to(tmp_path / "elsewhere")
    else:
        shard.write_bytes(data if damage == "flipped" else data[: len(data) // 2] if damage == "cut" else b"")
    run = profile(asked)
    assert "shard prefill-0.safetensors was damaged" in run.warnings[0]
    assert run.all_measures.equals(whole.all_measures)
    assert (run.path / "reservoir.safetensors").read_bytes() == (whole.path / "reservoir.safetensors").read_bytes()


# Signals and pipes


def test_sigterm_keeps_what_is_finished_and_says_how_to_go_on(
    zygote: Zygote, command: list[str], tmp_path: Path
) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    command = [*command, "-o", "out"]
    code, events = zygote.run(command, tmp_path / "whole")
    assert code == 0
    code, _ = zygote.run(command, tmp_path / "stopped", event=events // 2, signal=signal.SIGTERM)
    said = (tmp_path / "stopped.log").read_text()
    assert code == 130, said
    assert "Resume with:" in said
    assert "actsparse profile" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "stopped").rglob("*.tmp"))
    code, _ = zygote.run(command, tmp_path / "stopped")
    assert code == 0
    one, other = (ProfileRun.open(tmp_path / name / "out") for name in ("whole", "stopped"))
    assert one.all_measures.equals(other.all_measures)


# Clocks


def test_a_clock_that_jumps_back_changes_nothing_but_its_own_record(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile(spec(tiny_folder, prompts_file, tmp_path / "whole"))
    times = iter(datetime(2030, 1, 1, tzinfo=UTC) - timedelta(days=400 * i) for i in range(10))
    monkeypatch.setattr(provenance, "now", lambda: next(times).isoformat())
    run = profile(spec(tiny_folder, prompts_file, tmp_path / "run"))
    assert run.manifest.provenance.seconds == 0
    assert run.all_measures.equals(whole.all_measures)
    assert run.manifest.fingerprint == whole.manifest.fingerprint


def test_a_hash_is_not_taken_from_memory_when_only_the_clock_says_that_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before, stat = file_sha256(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(path) != before


@pytest.mark.parametrize(("option", "said"), [("size=8k", "no disk space left"), ("ro", "cannot be written")])
def test_an_export_that_does_not_fit_is_said_and_leaves_nothing(
    option: str, said: str, tiny_folder: Callable, prompts_file: Path, small_disk: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = profile(spec(tiny_folder, prompts_file, tmp_path / "run"))
    subprocess.run(["mount", "-o", f"remount,{option}", str(small_disk)], check=True)
    command = ["threshold", str(run.path), "--method", "static@0.5", "-o", str(tmp_path / "plan"), "-q"]
    assert main([*command, "--device", "cpu", "--export", str(small_disk / "smaller")]) == 1
    refused(capsys, said)
    assert list(small_disk.iterdir()) == []


def busy(*_command: object, **_options: object) -> None:
    raise subprocess.TimeoutExpired("git", 5)


@pytest.mark.parametrize("fault", ["absent", "busy"])
def test_a_run_does_not_need_git(
    fault: str, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "absent":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(provenance.subprocess, "run", busy)
    provenance._git_commit.cache_clear()
    try:
        run = profile(spec(tiny_folder, prompts_file, tmp_path / "run"))
    finally:
        provenance._git_commit.cache_clear()
    assert run.manifest.provenance.git_commit is None
