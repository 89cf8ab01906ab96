"""Local tasks of public data on the twin; skipped where the data is absent."""

import json
from itertools import islice
from pathlib import Path

import polars as pl
import pytest

from actsparse.pipelines.evaluate import evaluate
from actsparse.specs import DataSpec, EvalSpec, ModelSpec
from actsparse.store.runs import EvalRun

DATA = Path(__file__).parents[2] / "shared" / "data"
ITEMS = 4
PLAN = "griffin@0.6"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="the public evaluation data is not beside the checkout"),
]


def first_items(name: str, folder: Path) -> Path:
    """The first items of a file, as a task file of their own."""
    path = folder / f"{name.partition('.')[0]}.jsonl"
    with (DATA / name).open() as lines:
        path.write_text("".join(islice(lines, ITEMS)))
    return path


def scored(folder: Path, **spec: object) -> EvalRun:
    return evaluate(
        EvalSpec(
            model=ModelSpec(name="demo", device="cpu"),
            data=DataSpec(limit=1, block_length=64, prompt_length=32),
            plans=(PLAN,), controls=False, timing_pairs=0, generations=0, path_check_tokens=0,
            output=folder / "run", **spec,  # pyright: ignore[reportArgumentType]
        )
    )  # fmt: skip


def test_gsm8k_is_generated_and_compared_by_its_final_number(tmp_path: Path) -> None:
    file = first_items("gsm8k-test-300.jsonl", tmp_path)
    run = scored(tmp_path, task_files=(str(file),), task_limit=2, task_tokens=12)
    golds = [json.loads(line)["answer"].rpartition("#### ")[2] for line in file.read_text().splitlines()[:2]]
    rows = run.items.filter(metric="exact_match")
    assert rows.filter(plan="dense").sort("item")["gold"].to_list() == golds
    for row in rows.iter_rows(named=True):
        assert 0 < row["scored_tokens"] <= 12
        assert row["sparse_tokens"] == (0 if row["plan"] == "dense" else row["scored_tokens"] - 1)
        assert row["value"] in (0.0, 1.0)


def test_minimal_pairs_of_blimp_rank_whole_sentences(tmp_path: Path) -> None:
    """A pair is scored as two choices after the words that both sentences begin with."""
    file = tmp_path / "pairs.jsonl"
    with (DATA / "blimp-determiner_noun_agreement_1.jsonl").open() as lines:
        pairs = [json.loads(line) for line in islice(lines, ITEMS)]
    items = [
        {
            "query": pair["one_prefix_prefix"],
            "choices": [pair["one_prefix_word_good"] + ".", pair["one_prefix_word_bad"] + "."],
            "gold": 0,
        }
        for pair in pairs
    ]
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    run = scored(tmp_path, task_files=(str(file),))
    accuracy = run.results.filter(metric="acc", plan="dense")["value"].item()
    values = run.items.filter(plan="dense", metric="acc")["value"]
    assert accuracy == pytest.approx(values.mean())
    assert run.items.filter(pl.col("plan") == PLAN)["gold"].unique().to_list() == ["0"]
