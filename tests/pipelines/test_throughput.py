"""Throughput tables: null where an engine does not know, the memory of each arm, and what the manifest says."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import polars as pl
import pytest
import torch

from actsparse.engine import kept, memory
from actsparse.engine.own import OwnRun
from actsparse.pipelines import throughput
from actsparse.pipelines.evaluate import evaluate
from actsparse.specs import DataSpec, EvalSpec, ModelSpec

RATES = ("gb_per_s", "ceiling_share")


@pytest.fixture
def asked(tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> EvalSpec:
    return EvalSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(corpus=str(corpus_file), block_length=32, prompt_length=12, limit=3),
        plans=("griffin@0.5",),
        controls=False,
        timing_pairs=2,
        timing_tokens=2,
        generations=0,
        output=tmp_path / "run",
        throughput=True,
        batch_sizes=(2,),
        prompt_lengths=(8,),
        gen_lengths=(4,),
    )


def rates(rows: pl.DataFrame, plan: str) -> list[float | None]:
    return rows.filter((pl.col("plan") == plan) & pl.col("metric").is_in(RATES))["value"].to_list()


def test_an_engine_that_does_not_know_what_it_read_has_no_gigabytes_a_second(
    asked: EvalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnRun, "kept", lambda _run: {})
    run = evaluate(asked)
    for rows in (run.throughput, run.results):
        assert rates(rows, "griffin@0.5") == [None, None]
        assert all(value is not None and value > 0 for value in rates(rows, "dense"))
    ms = run.throughput.filter((pl.col("plan") == "griffin@0.5") & (pl.col("metric") == "ms_p50"))["value"]
    assert ms.item() > 0


def test_the_bytes_of_a_batch_are_those_that_the_engine_counted(
    asked: EvalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnRun, "kept", lambda _run: {("neuron", 0): 1.0, ("neuron", 1): 1.0})
    rows = evaluate(asked).throughput
    bytes_read = {
        plan: rates(rows, plan)[0] * rows.filter(plan=plan, metric="ms_p50")["value"].item()  # pyright: ignore
        for plan in ("dense", "griffin@0.5")
    }
    assert bytes_read["griffin@0.5"] == pytest.approx(bytes_read["dense"])


def test_memory_is_the_peak_of_each_arm_by_itself(asked: EvalSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter(mib * 2**20 for mib in (1, 5, 3, 2, 2, 4))  # dense and sparse in turn, three rounds
    seen: list[str] = []

    def peak(_device: torch.device) -> int:
        seen.append("peak")
        return next(peaks)

    monkeypatch.setattr(throughput, "reset_peak", lambda _device: seen.append("reset"))
    monkeypatch.setattr(throughput, "peak_bytes", peak)
    rows = evaluate(asked).throughput.filter(metric="memory_mb")
    assert dict(rows.select("plan", "value").iter_rows()) == {"dense": 3.0, "griffin@0.5": 5.0}
    assert seen == ["reset", "peak"] * 6


def test_the_peak_of_a_gpu_starts_anew_and_that_of_a_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", told.append)
    memory.reset_peak(torch.device("cpu"))
    assert told == []
    memory.reset_peak(torch.device("cuda", 1))
    assert told == [torch.device("cuda", 1)]


def test_a_half_batch_is_said_in_the_manifest(asked: EvalSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = OwnRun.prefill

    def failing(self: OwnRun, ids: torch.Tensor, **named: object) -> object:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return prefill(self, ids, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(OwnRun, "prefill", failing)
    run = evaluate(asked)
    assert run.throughput["batch_size"].unique().to_list() == [1]
    assert "out of memory in batches of 2 sequences: going on with batches of 1" in run.warnings


def test_lengths_that_do_not_repay_copies_are_timed_with_lists(
    asked: EvalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    laps = cycle([20.0, *[1.0, 0.5] * (kept.PAIRS + 1)])  # copies are repaid after 40 tokens
    monkeypatch.setattr(kept, "seconds", lambda _device, work: (work(), next(laps))[1])
    chosen: list[tuple[int | None, bool]] = []
    select = OwnRun.select

    def noted(self: OwnRun, tokens: int | None = None) -> None:
        select(self, tokens)
        chosen.append((tokens, "copied" in (self.reading or "")))

    monkeypatch.setattr(OwnRun, "select", noted)
    run = evaluate(replace(asked, batch_sizes=(1,), gen_lengths=(44, 4, 33), timing_pairs=0))
    assert {one for one in chosen if one[0] not in (None, asked.timing_tokens)} == {(44, True), (33, False)}
    made = run.throughput.filter(metric="ms_p50")
    assert sorted(made["gen_length"].to_list()) == [4, 4, 33, 33, 44, 44]


def test_a_plan_without_memory_is_left_out(asked: EvalSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(asked, throughput=False, plans=("griffin@0.5", "cats@0.5"))
    select = OwnRun.select

    def failing(self: OwnRun, tokens: int | None = None) -> None:
        if self.watches:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        select(self, tokens)

    monkeypatch.setattr(OwnRun, "select", failing)
    run = evaluate(asked)
    timed = run.results.filter(metric="speedup")["plan"].to_list()
    assert timed == ["cats@0.5"]
    assert any("griffin@0.5 was not timed: out of memory" in text for text in run.warnings)
