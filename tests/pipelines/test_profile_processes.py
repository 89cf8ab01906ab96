"""Profiles and processes: one that is killed, two on one directory, and several at work together."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actsparse.pipelines.profile import profile
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

# Profiles; dies for good after so many batches where asked to, and waits for a file to appear where asked to.
SCRIPT = """
import os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from actsparse.pipelines import recording
from actsparse.pipelines.profile import profile
from actsparse.pipelines.progress import Silent
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec

model, prompts, output, dies_after, in_rank, waits_for = sys.argv[1:]
recording.CHECKPOINT_SECONDS = -1.0
record, left = recording.Recorder.record, int(dies_after)

def counted(self, batch):
    global left
    if left == 0 and os.environ.get("RANK", "0") == in_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    while waits_for and not Path(waits_for).exists():
        Path(waits_for + ".waiting").touch()
        time.sleep(0.05)
    record(self, batch)

recording.Recorder.record = counted
profile(ProfileSpec(model=ModelSpec(name=model, device="cpu"), data=DataSpec(prompts=(prompts,)), output=Path(output),
                    batch_size=2, decode=3))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "profile_it.py"
    path.write_text(SCRIPT)
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(script: Path, model: Path, prompts: Path, output: Path, *, dies_after: int = -1, rank: int = 0,
          waits_for: str = "", team: int = 1) -> subprocess.Popen[str]:  # fmt: skip
    words = [str(script), str(model), str(prompts), str(output), str(dies_after), str(rank), waits_for]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={team}", "--standalone"] if team > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.fixture(scope="module")
def whole(tiny_folder: Callable, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    """The profile that one process makes without interruption."""
    torch.set_num_threads(1)
    return profile(
        ProfileSpec(
            model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
            data=DataSpec(prompts=(str(prompts_file),)),
            output=tmp_path_factory.mktemp("runs") / "whole",
            batch_size=2,
            decode=3,
        )
    )


def assert_same_bits(run: ProfileRun, whole: ProfileRun) -> None:
    for name in ("all_measures", "neurons", "heads", "decode_neurons", "decode_heads"):
        assert getattr(run, name).equals(getattr(whole, name)), name
    for name in ("histograms.safetensors", "reservoir.safetensors", "coactivation.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def assert_same_tables(run: ProfileRun, whole: ProfileRun) -> None:
    """Counts exactly, sums to 1e-9."""
    for name in ("all_measures", "neurons", "heads"):
        mine, other = getattr(run, name), getattr(whole, name)
        assert mine.height == other.height
        for column in mine.columns:
            if mine[column].dtype.is_float():
                assert mine[column].is_null().equals(other[column].is_null()), column
                values, expected = mine[column].drop_nulls().to_list(), other[column].drop_nulls().to_list()
                assert values == pytest.approx(expected, rel=1e-9, abs=1e-12), column
            else:
                assert mine[column].equals(other[column]), column
    assert (run.path / "histograms.safetensors").read_bytes() == (whole.path / "histograms.safetensors").read_bytes()


def test_a_killed_process_is_resumed_to_the_same_bits(
    script: Path, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, whole: ProfileRun
) -> None:
    # six batches of prefill, then two of decode
    killed = start(script, tiny_folder("llama"), prompts_file, tmp_path / "p", dies_after=8)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "p" / "unfinished.json").exists()
    assert list((tmp_path / "p" / "shards").iterdir())
    again = start(script, tiny_folder("llama"), prompts_file, tmp_path / "p")
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert_same_bits(ProfileRun.open(tmp_path / "p"), whole)


def test_a_second_process_on_the_same_directory_says_so_and_stops(
    script: Path, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, whole: ProfileRun
) -> None:
    go, output = tmp_path / "go", tmp_path / "p"
    first = start(script, tiny_folder("llama"), prompts_file, output, waits_for=str(go))
    try:
        while not go.with_name("go.waiting").exists():
            assert first.poll() is None, first.communicate()
        command = [sys.executable, "-m", "actsparse", "profile", "--model", str(tiny_folder("llama")), "--prompts"]
        second = subprocess.run(
            [*command, str(prompts_file), "-o", str(output), "--force"],
            capture_output=True, text=True, env=environment(), timeout=300, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "is being written by another process" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        go.touch()
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert_same_bits(ProfileRun.open(output), whole)


def test_two_processes_of_torchrun_make_the_tables_of_one(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, whole: ProfileRun
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "actsparse",
         "profile", "--model", str(tiny_folder("llama")), "--prompts", str(prompts_file), "--batch-size", "2",
         "--decode", "3", "--probes", "none", "--device", "cpu", "-o", str(tmp_path / "p")],
        capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert_same_tables(ProfileRun.open(tmp_path / "p"), whole)


def test_a_process_of_a_team_that_dies_leaves_a_run_that_resumes(
    script: Path, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, whole: ProfileRun
) -> None:
    team = start(script, tiny_folder("llama"), prompts_file, tmp_path / "p", dies_after=2, rank=1, team=2)
    team.communicate(timeout=300)
    assert team.returncode != 0
    assert (tmp_path / "p" / "unfinished.json").exists()
    names = {path.name for path in (tmp_path / "p" / "shards").iterdir()}
    assert "prefill-1.safetensors" in names
    again = start(script, tiny_folder("llama"), prompts_file, tmp_path / "p")
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert_same_tables(ProfileRun.open(tmp_path / "p"), whole)
