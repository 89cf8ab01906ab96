"""The report from the command line: commands that it names, `--open`, `--figures`, exit codes."""

import shlex
from pathlib import Path
from typing import Any

import example_runs as example
import pytest
import typer

from actsparse.cli import app as application
from actsparse.cli.app import app, main
from actsparse.methods.short import parse
from actsparse.pipelines.probes.names import DEFAULT, PROBES
from actsparse.pipelines.studies.registry import STUDIES as EVERY_STUDY
from actsparse.report.registry import ROWS
from actsparse.report.studies import COMMANDS
from actsparse.report.view import build_view
from actsparse.specs import ReportSpec

NAMED = sorted({row.command.format(model="demo") for row in ROWS})
STUDIES = [f"actsparse evaluate --model demo --study {name} --quick" for name in COMMANDS]


def parsed(command: str) -> dict[str, Any]:
    """The values that the parser of the command line takes from a command; raises where it refuses."""
    application._register()
    program, name, *words = shlex.split(command)
    assert program == "actsparse"
    group = typer.main.get_command(app)
    found = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    return found.make_context(name, words).params


@pytest.mark.parametrize("command", NAMED + STUDIES)
def test_every_command_that_a_report_names_can_be_run(command: str) -> None:
    values = parsed(command)
    assert values["model"] == "demo"
    for plan in values.get("plan") or ():
        assert parse(plan).text == plan
    assert set(str(values.get("probes") or DEFAULT).split(",")) <= {DEFAULT, *PROBES}


def test_a_report_names_every_study_and_its_experiments() -> None:
    assert set(COMMANDS) == set(EVERY_STUDY)
    for name, runners in EVERY_STUDY.items():
        first, last = runners[0].of.name, runners[-1].of.name
        assert first in COMMANDS[name]
        assert last in COMMANDS[name]


def test_the_parser_of_these_tests_refuses_what_the_program_refuses() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed("actsparse profile --model demo --no-such-option")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return example.eval_run(tmp_path / "eval", plans=example.PLANS[:1])


def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> Path:
    """A browser that notes what it is asked to open."""
    seen, script = tmp_path / "seen", tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" >> {seen}\nexit {status}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(script))
    monkeypatch.setattr("webbrowser._tryorder", None)
    return seen


def test_open_hands_the_page_to_the_browser(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = browser(tmp_path, monkeypatch, 0)
    assert main(["report", str(run), "-o", str(tmp_path / "r.html"), "--open"]) == 0
    assert seen.read_text().split() == [(tmp_path / "r.html").as_uri()]
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")


def test_without_open_the_address_stands_on_stderr(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "r.html")
    assert (tmp_path / "r.html").as_uri() in said.err.replace("\n", "")


def test_no_browser_is_said_and_is_no_failure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert main(["report", str(run), "-o", str(tmp_path / "r.html"), "--open"]) == 0
    assert "no browser could be started" in capsys.readouterr().err


def test_figures_that_are_there_stop_the_report_before_it_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build_view(ReportSpec(runs=(run,))).figures[0].id
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / f"{first}.csv").write_text("mine")
    command = ["report", str(run), "-o", str(tmp_path / "r.html"), "--figures", str(tmp_path / "figures")]
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "figures" / f"{first}.html").exists()


@pytest.mark.parametrize("arguments", [["absent"], [".", "--text"], ["absent", "--json"]])
def test_what_is_no_run_ends_with_1_and_a_hint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    said = capsys.readouterr()
    assert "hint:" in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [["--open"], ["-o", "page.html"], ["--figures", "figures"]])
@pytest.mark.parametrize("what", ["--text", "--json"])
def test_what_writes_no_file_refuses_options_that_need_one(
    what: str, more: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), what, *more]) == 1
    assert f"leave out {what}" in capsys.readouterr().err
