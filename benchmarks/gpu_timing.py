"""Timing on the device: graph replays between events, pairs in turn, medians and a paired bootstrap interval."""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two things timed in turn: medians in ms, and baseline / contender with a 95 % interval over pairs."""

    baseline_ms: float
    contender_ms: float
    speedup: float
    low: float
    high: float
    pairs: int


def elapsed_ms(work: Callable[[], object]) -> float:
    """Milliseconds that the device spends on `work`, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ms(work: Callable[[], object], *, repeats: int = 11, warm_ups: int = 2) -> float:
    for _ in range(warm_ups):
        work()
    return statistics.median(elapsed_ms(work) for _ in range(repeats))


def replay_of(work: Callable[[], object]) -> Callable[[], None]:
    """`work` captured in a CUDA graph, after one eager run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def paired(baseline: Callable[[], float], contender: Callable[[], float], *, pairs: int = 15) -> Paired:
    """Runs A B A B ...; each callable returns its own time in ms."""
    baseline(), contender()
    times = [(baseline(), contender()) for _ in range(pairs)]
    ratios = [one / two for one, two in times]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=pairs)) for _ in range(RESAMPLES))
    return Paired(
        baseline_ms=statistics.median(one for one, _ in times),
        contender_ms=statistics.median(two for _, two in times),
        speedup=statistics.median(ratios),
        low=medians[int(0.025 * RESAMPLES)],
        high=medians[int(0.975 * RESAMPLES) - 1],
        pairs=pairs,
    )
