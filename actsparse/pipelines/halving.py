"""Out of memory: the batch is halved once, which is said, and then it is an error with a way out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

import torch

from actsparse.errors import ModelError, is_out_of_memory

T = TypeVar("T")

Unit = Literal["sequences", "tokens"]
WAY_OUT = {"sequences": "start it again with --batch-size 1", "tokens": "leave it out with --probes none"}


class Warns(Protocol):
    """Takes warnings: what shows progress or, where the result has to hold them too, the session of a run."""

    def warn(self, text: str) -> None:
        """Tell something that makes a result weaker."""
        ...


def halving(
    attempt: Callable[[int | None], T], asked: int | None, largest: int, told: Warns, unit: Unit = "sequences"
) -> T:
    """What `attempt` returns for the batch size `asked` or, where memory does not suffice, for half of `largest`.

    `largest`: how many sequences the largest batch holds (or tokens). Raises ModelError where half of it is too much as
    well. `told` is warned of the half batch. An attempt starts from what was last kept, since a batch that failed may
    be in some of the sums.
    """
    if largest > 1:
        try:
            return attempt(asked)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        half = largest // 2
        told.warn(f"out of memory in batches of {largest} {unit}: going on with batches of {half}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        asked = largest = half
    with fitting(largest, unit):
        return attempt(asked)


@contextmanager
def fitting(batch: int = 1, unit: Unit = "sequences") -> Iterator[None]:
    """Out of memory in the block, which runs batches of so many sequences, is a ModelError with a way out."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise _too_much(batch, unit) from error
        raise


def _too_much(batch: int, unit: Unit) -> ModelError:
    held = "one sequence" if batch == 1 else f"a batch of {batch} {unit}"
    way = "give shorter texts or blocks, --dtype bfloat16" if batch == 1 else WAY_OUT[unit]
    return ModelError(
        f"out of memory: {held} does not fit beside the model",
        f"{way}, or spread the model with --device-map auto; what was finished is kept",
    )
