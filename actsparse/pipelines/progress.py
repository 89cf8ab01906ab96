"""How a stage tells what it is doing; the command line draws it, the Python API is silent by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from actsparse.results import ModelRecord

Advance = Callable[[int], None]


class Progress(Protocol):
    """A listener: single lines, warnings, and tasks with a total."""

    def note(self, text: str) -> None:
        """Tell a fact that a person should know."""
        ...

    def warn(self, text: str) -> None:
        """Tell something that makes a result weaker."""
        ...

    def detail(self, text: str) -> None:
        """Tell what only a person who asked for more detail wants to know."""
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

    def detail(self, text: str) -> None:
        del text

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        del what, total, unit
        yield lambda _units: None


def describe(model: ModelRecord, device: str) -> str:
    """One line about a loaded model: what it resolved to, its shape, and the bytes that a decode step reads."""
    ffn = f"{model.intermediate_size} {'gated ' if model.gated else ''}neurons ({model.activation})"
    return (
        f"{model.resolved}: {model.model_type}, {model.parameters:,} parameters, {model.layers} layers of {ffn},"
        f" {model.heads} heads in {model.kv_heads} KV groups, {model.dtype} on {device},"
        f" {model.step.total / 1e6:,.1f} MB a decode step"
    )
