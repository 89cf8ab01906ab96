"""The three ways to say which neurons are active at a token (methods.md section 4). No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

from actsparse.errors import ActsparseError

DENSITIES = (0.2, 0.5)
# The CETT level whose thresholds make the masks `cett`.
CETT_TARGET = 0.2


class MaskKind(StrEnum):
    """How active neurons are told: the largest of a token, those over the layer's CETT threshold, all but zeros."""

    TOPK = "topk"
    CETT = "cett"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class MaskRule:
    """One way to say which neurons are active at a token: `density` for TOPK, None for the others.

    TOPK: the largest |a| * ||w||, so many at every token; CETT: |a| * ||w|| >= eps of the layer at CETT 0.2; EXACT:
    a != 0. The last two keep more neurons at one token than at another.
    """

    kind: MaskKind
    density: float | None = None

    @property
    def name(self) -> str:
        """What its tensors are called."""
        return str(self.kind) if self.density is None else f"r{self.density:g}"

    @property
    def where(self) -> dict[str, object]:
        """What names it in `param`: `r=0.2`, `masks=cett` or `masks=exact`."""
        return {"masks": str(self.kind)} if self.density is None else {"r": self.density}


TOPK_RULES = tuple(MaskRule(MaskKind.TOPK, density) for density in DENSITIES)


def mask_kinds(asked: Iterable[str]) -> tuple[str, ...]:
    """The asked kinds, each once, in the order of `MaskKind`; `all` is every one.

    Raises ActsparseError with the nearest name where there is no such kind, and where none is asked for.
    """
    names = {name.strip() for name in asked if name.strip()}
    known = (*MaskKind, "all")
    for name in sorted(names):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ActsparseError(f"there are no masks '{name}'", f"{hint}known: {', '.join(known)}")
    if not names:
        raise ActsparseError("--masks names no kind of mask", "write for example --masks topk,cett")
    return tuple(str(kind) for kind in MaskKind if kind in names or "all" in names)


def mask_rules(kinds: Iterable[str]) -> tuple[MaskRule, ...]:
    """The rules of these kinds: top-k at both densities, then the others."""
    chosen = set(kinds)
    others = tuple(MaskRule(kind) for kind in (MaskKind.CETT, MaskKind.EXACT) if kind in chosen)
    return (*(TOPK_RULES if MaskKind.TOPK in chosen else ()), *others)
