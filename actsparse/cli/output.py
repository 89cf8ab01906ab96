"""The one place that prints. stdout is the answer; progress, notes, warnings and errors go to stderr."""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from actsparse.errors import ActsparseError
from actsparse.pipelines.progress import Advance

QUIET_SECONDS = 2.0
PLAIN_INTERVAL = 10.0
PLAIN_WIDTH = 160

# What may drive a terminal, or turn the order of what it shows: controls, marks of direction, other unprintables.
_UNPRINTABLE = re.compile(r"[^\n\x20-\x7e]")


def printable(text: str) -> str:
    """Text from outside with control characters made visible, so that it cannot drive a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else _visible(c) for c in text)


def _visible(character: str) -> str:
    """The escape of a character as Python writes it."""
    return character.encode("unicode_escape").decode("ascii")


def _json_escape(found: re.Match[str]) -> str:
    """A character of a JSON text as its escape; only strings can hold one that is not printable."""
    character = found.group()
    return character if character.isprintable() else json.dumps(character)[1:-1]


class _Answers(Console):
    """The console of the answer: that its reader left (`| head`) is for the application to handle, not exit code 1."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


class _Remarks(Console):
    """The console of progress and notes: the work goes on when no one listens to them any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _console(kind: type[Console], file: TextIO) -> Console:
    """A console as wide as its terminal, and wide enough for any table elsewhere."""
    return kind(file=file, highlight=False, soft_wrap=True, width=None if file.isatty() else PLAIN_WIDTH)


@dataclass
class Output:
    """Where a command's words go. `json`: stdout holds one document only; `quiet`: no progress and no notes."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    out: Console = field(default_factory=lambda: _console(_Answers, sys.stdout))
    err: Console = field(default_factory=lambda: _console(_Remarks, sys.stderr))
    noted: set[str] = field(default_factory=set)

    def note(self, text: str) -> None:
        """A fact that a person should know; each is told once."""
        if not self.quiet and text not in self.noted:
            self.noted.add(text)
            self.err.print(escape(printable(text)), style="dim")

    def warn(self, text: str) -> None:
        """Something that makes a result weaker; shown also when quiet."""
        self.err.print(f"[yellow]warning:[/] {escape(printable(text))}")

    def detail(self, text: str) -> None:
        """What `--verbose` adds."""
        if self.verbose and not self.quiet:
            self.err.print(escape(printable(text)), style="dim")

    def error(self, error: ActsparseError) -> None:
        """What happened, then one hint."""
        self.err.print(f"[red]error:[/] {escape(printable(error.what))}")
        if error.hint:
            self.err.print(f"[cyan]hint:[/] {escape(printable(error.hint))}")

    def interrupted(self, text: str) -> None:
        """What a person who stopped a command should know; shown also when quiet."""
        self.err.print("\n" + escape(printable(text)))

    def traceback(self) -> None:
        """The stack trace of the exception at work, for `--debug`."""
        self.err.print(escape(printable(traceback.format_exc())))

    def document(self, text: str) -> None:
        """The one JSON document of a command; characters that drive a terminal are written as escapes."""
        self.out.file.write(_UNPRINTABLE.sub(_json_escape, text.rstrip("\n")) + "\n")

    def line(self, text: str) -> None:
        """A line of the answer."""
        if not self.json:
            self.out.print(escape(printable(text)))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of the answer; the first column is text, the others are numbers."""
        if self.json:
            return
        table = Table(
            title=escape(printable(title)) or None, title_justify="left", header_style="bold", box=None, pad_edge=False
        )
        for index, column in enumerate(columns):
            table.add_column(
                escape(printable(column)), justify="right" if index else "left", no_wrap=index > 0, overflow="fold"
            )
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self.out.print(table)

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        """Progress over `total` units: bars on a terminal, plain lines elsewhere, nothing under two seconds."""
        began = time.monotonic()
        if self.quiet:
            yield lambda _units: None
        elif self.err.is_terminal:
            with self._bars() as bars:
                task = bars.add_task(escape(printable(what)), total=total, unit=unit)
                yield lambda units: bars.advance(task, units)
        else:
            yield _PlainProgress(self.err, escape(printable(what)), total, unit).advance
        self.detail(f"{what}: {total} {unit} in {time.monotonic() - began:.1f} s")

    def _bars(self) -> Bars:
        return Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


class _PlainProgress:
    """Lines such as `recording: 40 % (820/2048 tokens, 290/s, 4 s left)`, at most one in ten seconds."""

    def __init__(self, console: Console, what: str, total: int, unit: str) -> None:
        self.console, self.what, self.total, self.unit = console, what, total, unit
        self.began = self.shown = time.monotonic()
        self.done = 0

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        due = QUIET_SECONDS if self.shown == self.began else PLAIN_INTERVAL
        if now - self.shown < due or not self.total:
            return
        self.shown = now
        rate = self.done / max(1e-9, now - self.began)
        left = (self.total - self.done) / rate if rate else 0.0
        share = self.done / self.total
        self.console.print(
            f"{self.what}: {share:.0%} ({self.done}/{self.total} {self.unit}, {rate:.3g}/s, {left:.0f} s left)",
            style="dim",
        )
