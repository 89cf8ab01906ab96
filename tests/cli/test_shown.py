"""What the commands show when they have finished: tables that claim no more than was measured."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file, save_file
from tiny import LAYERS, save_tiny

from actsparse.cli.app import main
from actsparse.report.plans import Role, parse_plan

RULERS = ("oracle-a@0.5", "moefication:neurons=8,router=oracle@0.5")


@pytest.fixture(scope="module")
def evaluated(tiny_folder: Callable, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "eval"
    plans = [part for plan in (*RULERS, "griffin@0.5") for part in ("--plan", plan)]
    command = ["evaluate", "-m", str(tiny_folder("llama")), "--device", "cpu", "--corpus", str(corpus_file), "-n", "2",
               "--block-length", "32", "--prompt-length", "12", "--timing-pairs", "2", "--timing-tokens", "4",
               "--generations", "0", "--no-controls", *plans, "-o", str(path), "-q"]  # fmt: skip
    assert main(command) == 0
    return path


def row(text: str, name: str) -> list[str]:
    """The cells of the line that begins with a name."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"\s{2,}", line.strip())


def shown(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    capsys.readouterr()
    assert main([str(part) for part in command]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("plan", RULERS)
def test_a_ruler_shows_no_saving(plan: str, evaluated: Path) -> None:
    document = json.loads((evaluated / "summary.json").read_text())
    found = next(one for one in document["plans"] if one["plan"] == plan)
    assert found["ideal"]
    assert found["sparsity"]["useful"]["model_bytes_frac"] == 0.0
    results = pl.read_parquet(evaluated / "results.parquet").filter(metric="bytes_mlp")
    read = dict(results.select("plan", "value").iter_rows())
    assert read[plan] == read["dense"] > read["griffin@0.5"]


def test_the_terminal_and_the_report_say_that_a_ruler_saves_nothing(
    evaluated: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from actsparse.cli.output import Output
    from actsparse.cli.shown import show_eval
    from actsparse.store.runs import EvalRun

    capsys.readouterr()
    show_eval(EvalRun.open(evaluated), Output())
    told = capsys.readouterr().out
    for plan in RULERS:
        assert row(told, plan)[1] == "0.0 % (ruler)"
        assert parse_plan(plan).role is Role.ORACLE
    assert row(told, "griffin")[1] not in ("0.0 %", "0.0 % (ruler)")
    assert "a ruler saves nothing: its masks need what they would save" in told
    assert "ms/token: medians over laps" in told
    report = shown(capsys, "report", evaluated, "--text").replace("\u202f", " ")
    for plan in RULERS:
        line = next(line for line in report.splitlines() if line.startswith(f" {plan[:9]}"))
        assert "0.0 %" in line
        assert line.count("\u2013") == 3, "no speed-up, no ceiling, no time"
    page = tmp_path / "page.html"
    assert main(["report", str(evaluated), "-o", str(page), "-q"]) == 0
    assert "ruler; known before: " in page.read_text()


def test_each_plan_stands_beside_the_dense_laps_of_its_own_pairs(evaluated: Path) -> None:
    laps = pl.read_parquet(evaluated / "timing.parquet")
    results = pl.read_parquet(evaluated / "results.parquet").filter(plan="griffin@0.5")
    mine = laps.filter(plan="griffin@0.5", arm="dense", phase="decode")
    expected = (mine["seconds"] / mine["tokens"]).median()
    assert isinstance(expected, float)
    assert results.filter(metric="dense_ms_per_token")["value"][0] == pytest.approx(1e3 * expected, rel=1e-6)


@pytest.fixture(scope="module")
def half_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last layer gives no number at all."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("models") / "broken")
    held = load_file(folder / "model.safetensors")
    held[f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"].fill_(math.nan)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_entries_that_are_no_numbers_are_no_zeros(
    half_broken: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = shown(capsys, "profile", "-m", half_broken, "--prompts", prompts_file, "--probes", "none", "-o",
                 tmp_path / "run", "-q", "--device", "cpu")  # fmt: skip
    assert "exact zeros 0.0 % of neuron activations that are numbers" in told
    assert "are NaN or infinite" in told
    assert row(told, "mean")[0] == f"mean of {LAYERS - 1} of {LAYERS} layers"


def test_what_the_model_writes_has_lines_of_its_own(
    tiny_folder: Callable, prompts_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "--probes", "none", "--device", "cpu",
               "-n", "2", "-q"]  # fmt: skip
    told = shown(capsys, *command, "--decode", "3", "-o", tmp_path / "run")
    line = row(told, "written by the model itself")[0]
    assert line.startswith("written by the model itself: 6 tokens; exact zeros")
    assert "%" in row(told, "mean, text that the model writes")[1]
    assert "model itself" not in shown(capsys, *command, "-o", tmp_path / "other")
    part = shown(capsys, *command, "--layers", "1", "-o", tmp_path / "part")
    assert row(part, "mean")[0] == f"mean of 1 of {LAYERS} layers"


def test_a_plan_of_a_ruler_saves_nothing(
    tiny_folder: Callable, prompts_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "--probes", "none", "--device", "cpu"]
    shown(capsys, *command, "-o", tmp_path / "run", "-q")
    for method, rules in (("oracle-a@0.5", True), ("griffin@0.5", False)):
        told = shown(capsys, "threshold", tmp_path / "run", "--method", method, "-o", tmp_path / method, "-q")
        assert (row(told, "predicted")[1:] == ["50.0 %", "0.0 % (ruler)", "0.0 % (ruler)"]) == rules
        assert ("a ruler saves nothing" in told) == rules
        assert json.loads((tmp_path / method / "summary.json").read_text())["plan"]["ideal"] == rules


def test_what_is_recommended_after_a_short_text_can_be_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The cat sat on the mat and slept.\n\nA dog came by and barked at it for long.")
    assert main(["profile", "-m", "demo", "--prompts", "my.txt", "-o", "prof", "--probes", "none"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("next: actsparse "))
    assert main([*line.removeprefix("next: actsparse ").split(), "-o", "plan", "-q"]) == 0
    capsys.readouterr()
    assert main(["run", "-m", "demo", "--prompts", "my.txt", "-o", "runs", "--probes", "none", "-q"]) == 1
    said = capsys.readouterr().err
    assert "the half of the text that is fitted on has" in said
    assert "at least 512 tokens" in said


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("plan", "there is no plan directory 'plan' here, and no method of that name"),
        ("", "a plan without a name is given"),
        ("griffin", "does not say how much to drop"),
        ("grifin@0.5", "there is no method 'grifin'"),
    ],
)
def test_a_plan_that_is_none_is_said_as_it_was_meant(
    plan: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    assert main(["evaluate", "-m", "demo", "--plan", plan, "-o", str(tmp_path / "eval")]) == 1
    assert said in capsys.readouterr().err
