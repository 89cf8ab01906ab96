"""The probes by name, without torch, so that the command line can check them at once."""

from collections.abc import Iterable
from difflib import get_close_matches

from actsparse.errors import ActsparseError

PROBES = {
    "uncertainty": "HU1 with its controls, HU2",
    "inertia": "overlaps and SI2 on the input ladder, SI1, SI3, the 2x2",
    "union": "neurons that a batch needs together",
}
NOT_HERE = "HU3 (trained routers), HU4 and M2 (gradients), SI4 (evaluation)"


def probe_names(asked: Iterable[str]) -> tuple[str, ...]:
    """The asked probes, each once, in the order of `PROBES`; raises ActsparseError with the nearest name."""
    names = [name.strip() for name in asked if name.strip()]
    for name in names:
        if name not in PROBES:
            near = get_close_matches(name, PROBES, n=1)
            raise ActsparseError(
                f"there is no probe '{name}'",
                (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(PROBES)}",
            )
    return tuple(name for name in PROBES if name in names)


def left_out(chosen: Iterable[str]) -> str:
    """One line: what a profile with the probes `chosen` did not measure, and what measures it."""
    missing = {name: what for name, what in PROBES.items() if name not in set(chosen)}
    if not missing:
        return f"left out: {NOT_HERE}"
    listed = "; ".join(f"{name} ({what})" for name, what in missing.items())
    return f"left out: the probes {listed}: measure them with --probes {','.join(missing)}"
