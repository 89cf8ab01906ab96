"""How to share a budget between parts of a model: uniform, greedy by measured error, or by sensitivity.

A part is anything that can drop a share of itself (a projection, a layer's neurons); its weight is how much of the
budget it holds (its parameters). Every allocation meets sum_i w_i s_i / sum_i w_i = target.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

STEP = 0.01
FULL = 0.99


@dataclass(frozen=True, slots=True)
class Curve:
    """What dropping costs one part: `errors[j]` at the share `shares[j]`, ascending from (0, 0)."""

    shares: tuple[float, ...]
    errors: tuple[float, ...]


def greedy(
    weights: Sequence[float],
    target: float,
    error: Callable[[tuple[float, ...]], float],
    *,
    step: float = STEP,
    most: float = FULL,
) -> tuple[float, ...]:
    """The share of each part, raised step by step where it adds least error (TEAL, arXiv 2408.14690, section 4.3).

    A step drops an equal share `step` of all weights, so a small part goes up by more of itself; no part drops more
    than `most`. `error(shares)` is measured at every candidate. Errors that were measured before another part was
    raised are taken as lower bounds and measured again before they decide (errors add up as parts are raised), which
    spares most evaluations.
    """
    total = sum(weights)
    held = [weight / total for weight in weights]
    shares = [0.0] * len(held)
    spent, now = 0.0, 0.0
    queue = [(0.0, part, -1) for part in range(len(held))]
    heapq.heapify(queue)
    steps = 0
    while spent < target - 1e-12 and queue:
        amount = min(step, target - spent)
        added, part, measured_at = heapq.heappop(queue)
        raised = min(most, shares[part] + amount / held[part])
        if raised <= shares[part]:
            continue
        if measured_at != steps:
            candidate = (*shares[:part], raised, *shares[part + 1 :])
            heapq.heappush(queue, (error(candidate) - now, part, steps))
            continue
        spent += (raised - shares[part]) * held[part]
        shares[part] = raised
        now += added
        steps += 1
        heapq.heappush(queue, (added, part, -1))
    return tuple(shares)


def by_sensitivity(weights: Sequence[float], target: float, curves: Sequence[Curve]) -> tuple[float, ...]:
    """The share of each part that makes the sum of squared errors least, parts taken as independent (ours).

    Squares, because errors of different parts that are not aligned add up like lengths of right-angled vectors. Each
    curve of squares is replaced by its convex hull; segments are then taken in the order of error per weight.
    """
    total = sum(weights)
    held = [weight / total for weight in weights]
    segments: list[tuple[float, int, float, float]] = []
    for part, curve in enumerate(curves):
        for (low, cost), (high, more) in _hull(curve):
            segments.append(((more - cost) / ((high - low) * held[part]), part, low, high))
    shares, spent = [0.0] * len(held), 0.0
    for _, part, low, high in sorted(segments):
        room = target - spent
        if room <= 1e-12:
            break
        taken = min(high - low, room / held[part])
        shares[part] = low + taken
        spent += taken * held[part]
    return tuple(shares)


def _hull(curve: Curve) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The segments of the lower convex hull of a curve's squared errors, in order."""
    points = [(share, error * error) for share, error in zip(curve.shares, curve.errors, strict=True)]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return list(pairwise(hull))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
