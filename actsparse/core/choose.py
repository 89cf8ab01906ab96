"""Choosing one option for every part of a model so that enough bytes are saved at least cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

BISECTIONS = 100
MIN_BYTES = 1e-6
Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Option(Generic[Choice]):
    """What a part may do: bytes that it then saves, what that costs, and what it is."""

    saved: float
    cost: float
    choice: Choice


def pareto(options: Sequence[Option[Choice]]) -> list[Option[Choice]]:
    """The options that no other one beats in both, by bytes saved, ascending."""
    best: list[Option[Choice]] = []
    for option in sorted(options, key=lambda one: (-one.saved, one.cost)):
        if not best or option.cost < best[-1].cost:
            best.append(option)
    return best[::-1]


def cheapest(parts: Sequence[Sequence[Option[Choice]]], target: float) -> list[Option[Choice]]:
    """One option a part, saving at least `target` bytes in all at close to the least total cost.

    At a price per byte every part chooses alone; the price is bisected. Between the last price that saves too little
    and the first that saves enough, parts change over in the order of cost per byte until the target is met. Where no
    price saves enough, the options that save most are returned: the caller compares.
    """
    low, high = 0.0, _dearest(parts)
    most = [max(part, key=lambda one: (one.saved, -one.cost)) for part in parts]
    if _saved(most) <= target:
        return most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _saved(_at(parts, middle)) < target else (low, middle)
    under, over = _at(parts, low), _at(parts, high)
    over = over if _saved(over) >= target else most
    chosen, spent = list(under), _saved(under)
    changes = [part for part in range(len(parts)) if over[part].saved > under[part].saved]
    changes.sort(key=lambda i: (over[i].cost - under[i].cost) / (over[i].saved - under[i].saved))
    for part in changes:
        if spent >= target:
            break
        chosen[part] = over[part]
        spent += over[part].saved - under[part].saved
    return chosen


def _dearest(parts: Sequence[Sequence[Option[Choice]]]) -> float:
    """A price at which every part chooses what saves most, but for differences in bytes that are nothing."""
    costs = sum(max(one.cost for one in part) for part in parts)
    return (1.0 + costs) / MIN_BYTES


def _at(parts: Sequence[Sequence[Option[Choice]]], price: float) -> list[Option[Choice]]:
    return [min(part, key=lambda one: (one.cost - price * one.saved, one.saved)) for part in parts]


def _saved(chosen: Sequence[Option[Choice]]) -> float:
    return sum(one.saved for one in chosen)
