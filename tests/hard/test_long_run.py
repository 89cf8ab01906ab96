"""Profiles and evaluations again and again in one process: its memory stays flat. Minutes: `SOAK_MINUTES`."""

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.profile import profile
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))
WARM_UP = 6
GROWTH = 1.03


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not MINUTES, reason="a soak test: SOAK_MINUTES=60")
def test_memory_is_flat_over_repeated_profiles_and_evaluations(
    tiny_folder: Callable, prompts_file: Path, corpus_file: Path, tmp_path: Path
) -> None:
    model = ModelSpec(name=str(tiny_folder("llama")), device="cpu")
    measured: list[int] = []
    stop = time.monotonic() + 60 * MINUTES
    while time.monotonic() < stop or len(measured) <= 2 * WARM_UP:
        folder = tmp_path / f"{len(measured)}"
        profile(ProfileSpec(model=model, data=DataSpec(prompts=(str(prompts_file),)), output=folder / "p", probes=()))
        evaluate(
            EvalSpec(
                model=model, data=DataSpec(corpus=str(corpus_file), limit=2, block_length=24, prompt_length=12),
                plans=("griffin@0.5", "cats@0.5"), timing_pairs=1, timing_tokens=3, generations=1, max_new_tokens=3,
                output=folder / "e",
            )
        )  # fmt: skip
        shutil.rmtree(folder)
        gc.collect()
        measured.append(resident())
    early, late = max(measured[: 2 * WARM_UP]), max(measured[-WARM_UP:])
    course = ", ".join(f"{size / 1e6:.1f}" for size in measured[:: max(1, len(measured) // 40)])
    sys.stdout.write(f"{len(measured)} rounds, {early / 1e6:.1f} MB early, {late / 1e6:.1f} MB late: {course}\n")
    assert late <= GROWTH * early, course
