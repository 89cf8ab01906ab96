"""Same command, same seed, same machine: the same bytes of everything but timing and provenance."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from processes import Zygote, different, written

import actsparse

TIMED = frozenset({"ms_per_token", "dense_ms_per_token", "generate_ms_per_token", "prefill_ms", "select_ms", "ttft_ms",
                   "speedup", "speedup_low", "speedup_high", "break_even_tokens", "gb_per_s",
                   "ceiling_share"})  # fmt: skip


@pytest.fixture(scope="module")
def twice(
    zygote: Zygote, other_zygote: Zygote, tiny_folder: Callable, prompts_file: Path, corpus_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:  # fmt: skip
    """Every command, in two processes that order sets in different ways."""
    model = ["--model", str(tiny_folder("llama")), "--device", "cpu", "-q"]
    corpus = ["--corpus", str(corpus_file), "-n", "3", "--block-length", "32", "--prompt-length", "12"]
    router = "dejavu:rank=4,epochs=1@0.5"
    plans = ["griffin@0.5", "teal@0.4", "random@0.5", router]
    commands = {
        "profile": ["profile", *model, "--prompts", str(prompts_file), "--decode", "4", "--probes",
                    "uncertainty", "--dump", "0:neuron"],
        "plan": ["threshold", "profile", "--method", router, "-q"],
        "eval": ["evaluate", *model, *corpus, *(part for plan in plans for part in ("--plan", plan)), "--no-controls",
                 "--timing-pairs", "1", "--timing-tokens", "4", "--generations", "2", "--max-new-tokens", "6",
                 "--temperature", "0.9"],
        "study": ["evaluate", *model, *corpus, "--study", "pitfalls", "--quick", "--only", "P1"],
    }  # fmt: skip
    places = []
    for name, process in (("one", zygote), ("other", other_zygote)):
        place = tmp_path_factory.mktemp("twice") / name
        place.mkdir()
        for output, command in commands.items():
            code, _ = process.run([*command, "-o", output], place)
            assert code == 0, place.with_suffix(".log").read_text()
        code, _ = process.run(["report", "profile", "plan", "study", "-o", "page.html", "-q"], place)
        assert code == 0, place.with_suffix(".log").read_text()
        places.append(place)
    return places[0], places[1]


def untimed(place: Path) -> dict[str, object]:
    """What was written, without speeds."""
    found = written(place)
    del found["eval/timing.parquet"]
    results, summary = place / "eval" / "results.parquet", place / "eval" / "summary.json"
    found["eval/results.parquet"] = pl.read_parquet(results).filter(~pl.col("metric").is_in(TIMED)).rows()
    found["eval/summary.json"] = without_speed(json.loads(summary.read_bytes()))
    found["eval/manifest.json"] = {
        key: found["eval/manifest.json"][key] for key in ("fingerprint", "status", "identity")
    }  # pyright: ignore[reportIndexIssue]
    return found


def without_speed(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_speed(inner) for key, inner in value.items() if key not in ("speed", "warnings")}
    return [without_speed(inner) for inner in value] if isinstance(value, list) else value


def test_the_same_command_gives_the_same_bytes(twice: tuple[Path, Path]) -> None:
    one, other = (untimed(place) for place in twice)
    assert different(one, other) == []
    assert {"profile/measures.parquet", "plan/plan.safetensors", "eval/tokens.parquet", "page.html"} <= set(one)


def test_groups_and_joins_of_tables_keep_their_order() -> None:
    lost = []
    for path in Path(actsparse.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = {keyword.arg for keyword in node.keywords}
            of_tables = node.func.attr == "group_by" or (node.func.attr == "join" and "on" in named)
            if of_tables and "maintain_order" not in named:
                lost.append(f"{path.name}:{node.lineno}")
    assert lost == []
