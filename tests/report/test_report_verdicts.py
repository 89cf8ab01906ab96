"""Sentences and grades, computed from the numbers."""

from pathlib import Path

import example_runs as example
import pytest
from example_evals import ExamplePlan

from actsparse.report.outcomes import Outcome, outcomes_of
from actsparse.report.sources import read_sources
from actsparse.report.verdicts import Grade, grade, headline, verdicts
from actsparse.results import EvalRow, Verdict


def outcomes(path: Path, *plans: ExamplePlan, extra: tuple[EvalRow, ...] = ()) -> tuple[Outcome, ...]:
    left_out = ("tokens", "timing", "generations")
    run = example.eval_run(path / "eval", plans=plans, leave_out=left_out, extra=extra)
    return outcomes_of(read_sources((run,))[0])


def texts(found: tuple[Outcome, ...]) -> list[str]:
    return [sentence.text.replace("\u202f", " ") for sentence in verdicts(found)]


def test_the_sentence_in_the_manner_of_the_issue(tmp_path: Path) -> None:
    found = outcomes(
        tmp_path,
        ExamplePlan(plan="griffin@0.5", ppl=88.5, speed=1.24),
        ExamplePlan(plan="cats@0.2", ppl=23.0, speed=1.12),
    )
    assert texts(found) == [
        "CATS at 20 % of neurons: 1.12× faster decode (1.09\u20131.16, ceiling 1.42×), "
        "perplexity 22.5 → 23.0 (+2.2 %); usable.",
        "GRIFFIN at 50 % of neurons: 1.24× faster decode (1.21\u20131.28, ceiling 1.42×), "
        "perplexity 22.5 → 88.5 (+293 %); not usable here; "
        "the fastest plan within +5 % is CATS at 20 % of neurons, 1.12×.",
        "The fastest plan within +5 % perplexity is CATS at 20 % of neurons: "
        "1.12× faster decode (1.09\u20131.16, ceiling 1.42×), perplexity 22.5 → 23.0 (+2.2 %).",
    ]
    assert headline(list(found[1:])) is found[2]


def test_no_plan_is_good_enough(tmp_path: Path) -> None:
    found = outcomes(
        tmp_path, ExamplePlan(plan="griffin@0.5", ppl=88.5, speed=1.24), ExamplePlan(plan="cats@0.5", ppl=27.8)
    )
    said = texts(found)
    assert "speed not measured (no engine yet: quality only)" in said[1]
    assert said[-1] == (
        "No plan here is both faster for sure and within +5 % perplexity. "
        "The method that loses least is CATS at 50 % of neurons: +23.6 %, not timed."
    )


def test_a_better_static_mask_is_said(tmp_path: Path) -> None:
    static = ExamplePlan(plan="static:stat=griffin@0.5", ppl=60.0)
    found = outcomes(tmp_path, ExamplePlan(plan="griffin@0.5", ppl=88.5), static)
    assert "The static mask static:stat=griffin@0.5 (60.0, 55.2\u201365.4) does better" in texts(found)[0]


def test_the_paired_difference_decides_over_overlapping_intervals(tmp_path: Path) -> None:
    static = ExamplePlan(plan="static:stat=griffin@0.5", ppl=85.0)
    griffin = ExamplePlan(plan="griffin@0.5", ppl=88.5)
    open_question = texts(outcomes(tmp_path / "a", griffin, static))[0]
    assert "does not tell it apart" in open_question
    where = "reference=static:stat=griffin@0.5"
    paired = tuple(
        EvalRow(plan="griffin@0.5", metric=metric, param=where, value=value, unit="nats", n=1024)
        for metric, value in (("delta_nll", 0.04), ("delta_nll_low", 0.02), ("delta_nll_high", 0.06))
    )
    assert "does better" in texts(outcomes(tmp_path / "b", griffin, static, extra=paired))[0]


@pytest.mark.parametrize(
    ("ppl", "expected"),
    [(22.6, Grade.NEUTRAL), (23.5, Grade.USABLE), (26.0, Grade.COSTLY), (30.0, Grade.UNUSABLE), (None, Grade.UNKNOWN)],
)
def test_grades(tmp_path: Path, ppl: float | None, expected: Grade) -> None:
    assert grade(outcomes(tmp_path, ExamplePlan(plan="griffin@0.5", ppl=ppl))[1]) is expected


@pytest.mark.parametrize(
    ("speed", "verdict"), [(1.2, Verdict.FASTER), (1.01, Verdict.NOT_SIGNIFICANT), (0.9, Verdict.SLOWER)]
)
def test_the_verdict_follows_the_interval(tmp_path: Path, speed: float, verdict: Verdict) -> None:
    assert outcomes(tmp_path, ExamplePlan(plan="griffin@0.5", ppl=30.0, speed=speed))[1].verdict is verdict


def test_a_baseline_is_never_recommended_for_infinite_perplexity(tmp_path: Path) -> None:
    found = outcomes(tmp_path, ExamplePlan(plan="griffin@0.5", ppl=float("inf")))
    assert texts(found)[-1] == "No plan here is both faster for sure and within +5 % perplexity."
