"""What reaches a terminal: no control characters of strangers, no stack traces, and a reader that leaves early."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.cli import app
from actsparse.cli.app import main
from actsparse.cli.output import Output, printable
from actsparse.errors import ActsparseError

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\r[bold]"


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(text=st.text() | st.text(alphabet="\x00\x1b\x7f\x85\x9b\u200f\u2028\u202e\ud800a[/]\\"))
def test_every_way_of_printing_is_harmless(text: str) -> None:
    import io

    from rich.console import Console

    out, err = io.StringIO(), io.StringIO()
    output = Output(verbose=True, out=Console(file=out, width=100), err=Console(file=err, width=100))
    output.note(text)
    output.warn(text)
    output.detail(text)
    output.line(text)
    output.interrupted(text)
    output.error(ActsparseError(text, text))
    output.table(text, ["a"], [[text]])
    with output.task(text, 1, "tokens") as advance:
        advance(1)
    assert is_harmless(out.getvalue())
    assert is_harmless(err.getvalue())
    out.truncate(0)
    out.seek(0)
    output.document(json.dumps({"x": text}, ensure_ascii=False))
    assert is_harmless(out.getvalue())
    assert json.loads(out.getvalue()) == {"x": text}


def test_what_is_printable_stays_as_it_is() -> None:
    assert printable("naïve 語 [b] \\ 50 %\n\t") == "naïve 語 [b] \\ 50 %\n\t"
    assert printable("\x1b") == "\\x1b"
    assert printable("\u202e") == "\\u202e"


@pytest.mark.parametrize(
    "argv",
    [
        ["profile", "--model", EVIL], ["profile", "-m", "demo", "--prompts", EVIL], ["profile", f"--{EVIL}"],
        [EVIL], ["report", EVIL], ["models", EVIL], ["profile", "-m", "demo", "-n", EVIL],
        ["evaluate", "-m", "demo", "--plan", f"{EVIL}@0.5"], ["--config", EVIL, "profile"],
        ["profile", "-m", "demo", "--layers", EVIL], ["threshold", EVIL, "--method", EVIL],
    ],
)  # fmt: skip
def test_names_cannot_drive_the_terminal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) in (1, 2)
    found = capsys.readouterr()
    assert is_harmless(found.out)
    assert is_harmless(found.err)
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (ZeroDivisionError("division\nby zero"), "a fault of actsparse itself: ZeroDivisionError: division", "--debug"),
        (MemoryError(), "out of memory", "--batch-size"),
        (PermissionError(13, "Permission denied", "x"), "the system refused", "--debug"),
        (RecursionError("too deep"), "RecursionError", "--debug"),
    ],
)
def test_what_nobody_foresaw_is_one_message_and_a_trace_only_with_debug(
    error: Exception, said: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: object) -> int:
        raise error

    monkeypatch.setattr(app, "app", failing)
    assert main(["profile"]) == 1
    found = capsys.readouterr()
    assert said in found.err
    assert hint in found.err
    assert "Traceback" not in found.err
    assert main(["profile", "--debug"]) == 1
    found = capsys.readouterr()
    assert "Traceback" in found.err
    assert said in found.err


def test_debug_shows_what_a_library_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    assert main(["profile", "-m", str(tmp_path), "--debug"]) == 1
    found = capsys.readouterr().err
    assert "Traceback" in found
    assert "config.json cannot be used" in found


@pytest.fixture(scope="module")
def small_run(tiny_folder: Callable, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "run"
    argv = ["profile", "-m", str(tiny_folder("llama")), "--device", "cpu", "--prompts", str(prompts_file), "-n", "2"]
    assert main([*argv, "--block-length", "16", "--prompt-length", "8", "--probes", "none", "-o", str(path), "-q"]) == 0
    return path


def without_reader(stream: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command with a pipe that no one reads as its stdout or stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
    try:
        return subprocess.run([sys.executable, "-m", "actsparse", *words], **streams, text=True, check=False)
    finally:
        os.close(writing)


PAGES = [(), ("--help",), ("--version",), *((name, "--help") for name in app.COMMANDS)]
ANSWERS = [("models", "--json"), ("models",), ("methods",), ("methods", "tda"), ("report", "RUN", "--text")]


@pytest.mark.parametrize("words", [*PAGES, *ANSWERS], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(words: tuple[str, ...], small_run: Path) -> None:
    done = without_reader("stdout", *(str(small_run) if word == "RUN" else word for word in words))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_without_streams_does_its_work(closed: str, small_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = f"{sys.executable} -m actsparse report {small_run} -o {page} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert page.read_text().rstrip().endswith("</html>")


def test_a_word_that_is_not_known_stays_an_error_when_no_one_reads_it() -> None:
    for words in (("prophile",), ("profile", "--modle", "demo"), ("profile",)):
        assert without_reader("stderr", *words).returncode == 2


def test_the_answer_is_whole_when_no_one_reads_the_notes(small_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = without_reader("stderr", "report", str(small_run), "-o", str(page), "--verbose")
    assert (done.returncode, done.stdout.strip()) == (0, str(page))
    assert page.read_text().rstrip().endswith("</html>")
