"""A listener to progress that remembers what it was told, and may interrupt."""

from collections.abc import Iterator
from contextlib import contextmanager

from actsparse.pipelines.progress import Advance, Silent


class Listener(Silent):
    """Ctrl-C at the `after`-th step of the task `what` (0: never); `notes` and warnings that were given, and `tasks`
    that were begun."""

    def __init__(self, what: str = "", after: int = 0) -> None:
        self.what, self.left = what, after
        self.notes: list[str] = []
        self.tasks: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        self.tasks.append(what)

        def advance(_units: int) -> None:
            if what == self.what:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance
