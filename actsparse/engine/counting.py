"""What the steps of a plan read, as their operators count it."""

from collections.abc import Iterable, Mapping, Sequence

from actsparse.engine.refresh import Refresh
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.work import GatePlan


class Counting:
    """The counts of `plan` and of the plans that run in its place while gates choose again (`refresh`).

    known: those of an engine, by the plan's identity.
    """

    def __init__(self, known: Mapping[int, Sequence[Counter]], plan: GatePlan, refresh: Refresh | None) -> None:
        self._known = known
        self._plan = plan
        self._refresh = refresh

    def shares(self, steps: int) -> dict[tuple[str, int], float]:
        """The share of each unit of each layer that `steps` steps have read since `forget`."""
        dense = self._refresh.dense_steps if self._refresh else {}
        own = self._known.get(id(self._plan), ())
        totals = {(one.unit, one.layer): one.total for one in own}
        read = {(unit, layer): total * dense.get(layer, 0) for (unit, layer), total in totals.items()}
        for plan in (self._plan, *self._others()):
            for one in self._known.get(id(plan), ()):
                read[one.unit, one.layer] += int(one.read)
        return {place: found / (max(1, steps) * totals[place]) for place, found in read.items()}

    def forget(self) -> None:
        """Count from here on."""
        for plan in (self._plan, *self._others()):
            for one in self._known.get(id(plan), []):
                one.read.zero_()

    def _others(self) -> Iterable[GatePlan]:
        return self._refresh.recorders if self._refresh else ()
