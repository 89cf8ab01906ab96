"""Verdicts of the page of results: at unequal bytes there is none, and auto's rival is the best plan measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass(frozen=True)
class Measured:
    """What a page reads of a finished evaluation."""

    results: pl.DataFrame
    tokens: pl.DataFrame


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods_page

    return methods_page


def measured(plans: Mapping[str, tuple[float, float]]) -> Measured:
    """A run of four blocks of two tokens; by plan its NLL and its realised share of bytes."""
    rows, tokens = [], []
    for plan, (nll, share) in plans.items():
        where = {"plan": plan, "param": ""}
        rows += [where | {"metric": metric, "value": nll} for metric in ("ppl", "ppl_low", "ppl_high", "kl", "top1")]
        rows += [where | {"metric": "model_bytes_frac", "param": "basis=realised", "value": share}]
        rows += [where | {"metric": "kept_frac", "param": "layer=0,proj=q", "value": 0.5}]
        rows += [where | {"metric": "rel_err", "param": "layer=0", "value": 0.1}]
        tokens += [
            {"plan": plan, "block": block, "position": at, "nll": nll + 0.001 * block}
            for block in range(4)
            for at in range(2)
        ]
    return Measured(pl.DataFrame(rows), pl.DataFrame(tokens))


def entry(page: ModuleType, label: str, share: float = 0.5) -> object:
    return page.Entry(label, share, f"{label}@{share:g}")


@pytest.mark.parametrize(
    ("share", "verdict", "counts"),
    [
        (0.265, "unequal bytes (+1.5 points)", "the own prompt is better in 0, one mask for all text in 0; 1 are at"),
        (0.235, "unequal bytes (-1.5 points)", "the own prompt is better in 0, one mask for all text in 0; 1 are at"),
        (0.252, "static", "the own prompt is better in 0, one mask for all text in 1; 0 are at"),
    ],
)
def test_no_verdict_at_unequal_bytes(page: ModuleType, share: float, verdict: str, counts: str) -> None:
    book = page.Book([measured({"tda@0.5": (4.2, share), "static:stat=griffin@0.5": (4.0, 0.25)})])
    table = {0.25: [entry(page, "tda"), entry(page, "static:stat=griffin")]}
    told = page.control_section(book, table)
    assert told.splitlines()[-1].endswith(f"| {verdict} |")
    assert counts in told
    ordering = page.ordering_section(book, table)
    assert ("1 do not" in ordering) == (verdict == "static")
    assert ("is 0.200 nats worse" in ordering) == (verdict == "static")


def test_an_allocation_that_saves_less_is_no_gain(page: ModuleType) -> None:
    book = page.Book([measured({"teal@0.5": (4.0, 0.407), "teal:allocation=greedy@0.5": (3.8, 0.396)})])
    told = page.allocation_section(book, {0.4: [entry(page, "teal:allocation=greedy")]}, {0.4: [entry(page, "teal")]})
    assert "0 of 1 are better" in told
    assert "largest gain" not in told
    assert told.endswith("| unequal bytes (-1.1 points) |")


def test_auto_stands_beside_the_best_plan_that_was_measured(page: ModuleType) -> None:
    plans = {
        "auto@0.4": (4.0, 0.4), "teal@0.5": (4.1, 0.4), "teal:allocation=greedy@0.5": (3.9, 0.399),
        "oracle-n@0.5": (3.0, 0.4),
    }  # fmt: skip
    labels = ("teal", "teal:allocation=greedy", "oracle-n")
    entries = [entry(page, "auto", 0.4), *(entry(page, label) for label in labels), entry(page, "teal")]
    told = page.auto_section(page.Book([measured(plans)]), {0.4: entries})
    line = next(line for line in told.splitlines() if line.startswith("| 40% | 4 |"))
    assert "| 2 | `teal:allocation=greedy@0.5` 3.9 | 39.9% |" in line
    assert line.endswith("| **missed** |")
