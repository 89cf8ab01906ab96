"""Medians, pairs and verdicts from laps that nobody ran."""

import pytest

from actsparse.engine.timing import Lap, Speed, summary
from actsparse.results import Verdict


def laps(dense: list[float], sparse: list[float], tokens: int = 10, select: float = 0.004) -> list[Lap]:
    """Decode laps in seconds a lap, with three prefills of 20 ms (watched: 25 ms) and selections."""
    found = [
        Lap(arm=arm, phase="decode", repetition=i, tokens=tokens, seconds=pair[j])
        for i, pair in enumerate(zip(dense, sparse, strict=True))
        for j, arm in enumerate(("dense", "sparse"))
    ]
    for i in range(3):
        found += [
            Lap(arm="dense", phase="prefill", repetition=i, tokens=64, seconds=0.020),
            Lap(arm="sparse", phase="prefill", repetition=i, tokens=64, seconds=0.025),
            Lap(arm="sparse", phase="select", repetition=i, tokens=64, seconds=select),
        ]
    return found


def test_medians_are_per_token_and_in_milliseconds() -> None:
    speed = summary({0: laps([0.10, 0.90, 0.12], [0.05, 0.06, 0.40])})
    assert speed.dense_ms == pytest.approx(12.0)
    assert speed.sparse_ms == pytest.approx(6.0)
    assert (speed.dense_prefill_ms, speed.sparse_prefill_ms) == (pytest.approx(20.0), pytest.approx(25.0))
    assert speed.select_ms == pytest.approx(4.0)
    assert speed.ttft_ms == pytest.approx(29.0)
    assert speed.pairs == 3


def test_the_ratio_is_taken_pair_by_pair() -> None:
    # both arms drift by the same factor: medians of the arms alone would not show a constant ratio
    speed = summary({0: laps([0.1, 0.2, 0.4, 0.8], [0.05, 0.1, 0.2, 0.4])})
    assert speed.speedup == pytest.approx(2.0)
    assert (speed.low, speed.high) == (pytest.approx(2.0), pytest.approx(2.0))


def test_ratios_of_several_prompts_are_pooled() -> None:
    speed = summary({0: laps([0.1, 0.1], [0.05, 0.05]), 3: laps([0.4], [0.1], tokens=20)})
    assert speed.pairs == 3
    assert speed.speedup == pytest.approx(2.0)
    assert speed.dense_ms == pytest.approx(10.0)


def test_faster_slower_and_neither() -> None:
    assert summary({0: laps([0.2] * 5, [0.1] * 5)}).verdict is Verdict.FASTER
    assert summary({0: laps([0.1] * 5, [0.2] * 5)}).verdict is Verdict.SLOWER
    mixed = summary({0: laps([0.1, 0.2, 0.1, 0.2, 0.1, 0.2], [0.2, 0.1, 0.2, 0.1, 0.2, 0.1])})
    assert mixed.verdict is Verdict.NOT_SIGNIFICANT
    assert mixed.low < 1 < mixed.high


def test_break_even_repays_watching_and_selecting() -> None:
    speed = summary({0: laps([0.10] * 3, [0.06] * 3)})
    # 4 ms saved a token; watching costs 5 ms more than a dense prefill, selection 4 ms
    assert speed.break_even_tokens == pytest.approx(9.0 / 4.0)


def test_break_even_never_comes_when_nothing_is_saved() -> None:
    assert summary({0: laps([0.1] * 3, [0.1] * 3)}).break_even_tokens is None


def test_break_even_is_never_negative() -> None:
    speed = Speed(
        dense_ms=2.0, sparse_ms=1.0, dense_prefill_ms=30.0, sparse_prefill_ms=20.0, select_ms=1.0, speedup=2.0,
        low=1.9, high=2.1, pairs=3,
    )  # fmt: skip
    assert speed.break_even_tokens == 0.0
