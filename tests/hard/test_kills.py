"""Commands that are killed for good at moments drawn by a seed: what is resumed equals what was never interrupted."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Zygote, different, written

from actsparse.errors import RunError
from actsparse.store.runs import open_any

KILLS = int(os.environ.get("SOAK_KILLS", "3"))
SEED = int(os.environ.get("SOAK_SEED", "0"))


@pytest.fixture(scope="module")
def commands(
    zygote: Zygote,
    tiny_folder: Callable,
    prompts_file: Path,
    corpus_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """The command lines; each writes `out` in its working directory, or what it says."""
    place = tmp_path_factory.mktemp("given")
    (place / "w").mkdir()
    model = ["--model", str(tiny_folder("llama")), "--device", "cpu"]
    text = ["--prompts", str(prompts_file), "--block-length", "32", "--prompt-length", "12"]
    profile = ["profile", *model, *text, "--batch-size", "2", "--probes", "uncertainty", "-o", "out", "-q"]
    code, _ = zygote.run([*profile[:-2], str(place / "profile"), "-q"], place / "w")
    assert code == 0, (place / "w.log").read_text()
    evaluate = ["evaluate", *model, "--corpus", str(corpus_file), "-n", "3", "--block-length", "32", "--prompt-length",
                "12", "--timing-pairs", "0", "--generations", "2", "--max-new-tokens", "3", "--plan", "griffin@0.5",
                "--plan", "cats@0.5", "-o", "out", "-q"]  # fmt: skip
    threshold = ["threshold", str(place / "profile"), "--method", "dejavu", "--sparsity", "0.5", "-o", "out", "-q"]
    run = ["run", *model, *text, "-n", "3", "--plan", "static@0.5", "--probes", "none", "--timing-pairs", "0", "-q"]
    report = ["report", str(place / "profile"), "-o", "out.html", "--force", "-q"]
    return {"profile": profile, "threshold": threshold, "evaluate": evaluate, "report": report, "run": run}


def runs_in(folder: Path) -> list[Path]:
    """The run directories below a folder, half-written ones too."""
    marks = [path for name in ("manifest.json", "unfinished.json") for path in folder.rglob(name)]
    return sorted({mark.parent for mark in marks})


def check_not_accepted_half_written(folder: Path) -> None:
    """A run either opens whole or is refused; a report is whole or absent."""
    for run in runs_in(folder):
        if (run / "manifest.json").exists():
            open_any(run)
        else:
            with pytest.raises(RunError, match="incomplete"):
                open_any(run)
    for page in folder.glob("*.html"):
        assert page.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("name", ["profile", "threshold", "evaluate", "report", "run"])
def test_a_command_that_is_killed_again_and_again_ends_as_if_it_never_was(
    name: str, zygote: Zygote, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.monotonic()
    code, events = zygote.run(commands[name], whole)
    seconds = time.monotonic() - began
    assert code == 0, whole.with_suffix(".log").read_text()
    expected = written(whole)
    draw = random.Random(f"{name} {SEED}")
    killed = at_work = 0
    while killed < KILLS:
        # three kills on top of each other, then the command is left alone
        place = tmp_path / f"killed-{killed}"
        place.mkdir()
        for _ in range(min(3, KILLS - killed)):
            by_event = KILLS == 3 or draw.random() < 0.5
            when = {"event": draw.randrange(events)} if by_event else {"seconds": draw.uniform(0, seconds)}
            code, _ = zygote.run(commands[name], place, **when)
            assert code in (0, -signal.SIGKILL), place.with_suffix(".log").read_text()
            killed += 1
            at_work += code != 0
            check_not_accepted_half_written(place)
        code, _ = zygote.run(commands[name], place)
        assert code == 0, place.with_suffix(".log").read_text()
        assert different(written(place), expected) == []
        assert not [path for path in place.rglob("*") if path.suffix == ".tmp" or path.name == "shards"]
        shutil.rmtree(place)
    assert at_work
    sys.stdout.write(f"{name}: {killed} kills, {at_work} of them at work, all resumed to the same results\n")
