"""The probes by name, without torch, so that the command line can check them at once."""

from collections.abc import Iterable
from difflib import get_close_matches

from actsparse.core.mask_rules import MaskKind
from actsparse.errors import ActsparseError

PROBES = {
    "uncertainty": "HU1 with its controls, HU2",
    "inertia": "overlaps and SI2 on the input ladder, SI1, SI3, the 2x2",
    "union": "neurons that a batch needs together",
    "gradients": "HU4 and M2, from backward passes",
}
GRADIENTS = "gradients"
# What a set of probes is called: those that a profile measures by itself (as far as its text allows); the same for
# models so small that they cost little; every one; none.
DEFAULT, CHEAP, ALL, NONE = "default", "cheap", "all", "none"
BY_DEFAULT = ("uncertainty", "inertia", "union")
CHEAP_PARAMETERS = 50_000_000
NOT_HERE = "HU3, SI4 (actsparse evaluate --study moyu --only HU3,M5)"

# What layers of experts have no definition for, and why: of the probe `gradients`, and of every profile.
NO_HU4 = (
    "HU4 of layers of experts (it ranks all neurons of a layer at a token, which passes through some experts alone)"
)
NO_SPREAD = "the spread of CETT over tokens and positions (a threshold of one expert says nothing of another's neurons)"


def probe_names(asked: Iterable[str]) -> tuple[str, ...]:
    """The asked probes, each once, in the order of `PROBES`; raises ActsparseError with the nearest name.

    `all` is every probe, `none` stands alone; `default` and `cheap` stay in front, for `chosen` to decide.
    """
    names = {name.strip() for name in asked if name.strip()}
    known = (*PROBES, DEFAULT, CHEAP, ALL, NONE)
    for name in sorted(names):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ActsparseError(
                f"there is no probe '{name}'",
                (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(known)}",
            )
    if NONE in names and len(names) > 1:
        raise ActsparseError(
            f"the probes are '{NONE}' and others: {', '.join(sorted(names - {NONE}))}",
            "give --probes one or the others",
        )
    sets = tuple(name for name in (DEFAULT, CHEAP) if name in names)
    return sets + tuple(name for name in PROBES if name in names or ALL in names)


def chosen(names: Iterable[str], parameters: int) -> tuple[str, ...]:
    """The probes behind the names of a set, for a model of so many parameters."""
    asked = set(names)
    if DEFAULT in asked or (CHEAP in asked and parameters <= CHEAP_PARAMETERS):
        asked |= set(BY_DEFAULT)
    return tuple(name for name in PROBES if name in asked)


def left_out(chosen: Iterable[str], masks: Iterable[str] = (), *, experts: bool = False) -> str:
    """One line: what a profile with the probes `chosen` on these `masks` did not measure, and what measures it; of a
    mixture of `experts` also what is not defined there, and why."""
    done, kinds = set(chosen), tuple(masks)
    missing = {name: what for name, what in PROBES.items() if name not in done}
    parts: list[str] = []
    if set(missing) == {GRADIENTS}:
        parts.append(f"{missing[GRADIENTS]} (--gradients)")
    elif missing:
        parts.append(f"{'; '.join(missing.values())} (--probes {','.join(missing)})")
    others = [kind for kind in MaskKind if kind not in kinds]
    if others and kinds and done - {GRADIENTS}:
        parts.append(f"masks by {', '.join(others)} (--masks all)")
    if experts:
        parts += [NO_HU4, NO_SPREAD] if GRADIENTS in done else [NO_SPREAD]
    return "left out: " + "; ".join([*parts, NOT_HERE])
