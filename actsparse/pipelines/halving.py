"""Out of memory: the batch is halved once, which is said, and then it is an error with a way out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from actsparse.errors import ModelError, is_out_of_memory
from actsparse.pipelines.progress import Progress

T = TypeVar("T")


def halving(attempt: Callable[[int | None], T], asked: int | None, largest: int, progress: Progress) -> T:
    """What `attempt` returns for the batch size `asked` or, where memory does not suffice, for half of `largest`.

    `largest`: how many sequences the largest batch holds. Raises ModelError where half of it is too much as well. An
    attempt starts from what was last kept, since a batch that failed may be in some of the sums.
    """
    try:
        return attempt(asked)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if largest < 2:
            raise _too_much(1) from error
    half = largest // 2
    progress.warn(f"out of memory in batches of {largest} sequences: going on with batches of {half}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return attempt(half)
    except Exception as error:
        if is_out_of_memory(error):
            raise _too_much(half) from error
        raise


def _too_much(batch: int) -> ModelError:
    held = "one sequence" if batch == 1 else f"a batch of {batch} sequences"
    way = "give shorter texts or blocks, --dtype bfloat16" if batch == 1 else "start it again with --batch-size 1"
    return ModelError(
        f"out of memory: {held} does not fit beside the model",
        f"{way}, or spread the model with --device-map auto; what was finished is kept",
    )
