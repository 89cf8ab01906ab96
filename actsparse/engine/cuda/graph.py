"""Capturing a step in one CUDA graph, with fallbacks that are announced."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actsparse.errors import is_out_of_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A step that can be run again by `run`; `kind` is "graph" or "eager", `warning` why it is not better.

    `step` is kept, with all that it owns, because a replay uses the same memory.
    """

    step: Callable[[], None]
    run: Callable[[], object]
    kind: str
    warning: str | None = None


def capture(step: Callable[[], None], *, warm_ups: int = 2) -> Captured:
    """`step` as a graph replay after `warm_ups` eager runs (compilation and allocation happen there), or eager.

    `step` must read and write fixed buffers only; the caller restores whatever the warm-ups changed. Raises torch's own
    error where memory does not suffice.
    """
    if not torch.cuda.is_available():
        return Captured(step=step, run=step, kind="eager")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        if is_out_of_memory(error):
            del graph  # and with it what the capture holds
            torch.cuda.empty_cache()
            _free_generator()
            raise  # a smaller batch may have room
        _free_generator()
        return Captured(
            step=step, run=step, kind="eager", warning=f"the step could not be captured in a CUDA graph: {error}"
        )
    return Captured(step=step, run=graph.replay, kind="graph")


def _free_generator() -> None:
    """Lets random numbers be drawn again: a capture that fails leaves the device's generator in it, one that ends does
    not."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
