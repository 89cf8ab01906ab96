"""How a stage tells what it is doing; the command line draws it, the Python API is silent by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """A listener: single lines, warnings, and tasks with a total."""

    def note(self, text: str) -> None:
        """Tell a fact that a person should know."""
        ...

    def warn(self, text: str) -> None:
        """Tell something that makes a result weaker."""
        ...

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Open a task of `total` units; the context gives a function that advances it."""
        ...


class Silent:
    """A listener that shows nothing."""

    def note(self, text: str) -> None:
        del text

    def warn(self, text: str) -> None:
        del text

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        del what, total, unit
        yield lambda _units: None
