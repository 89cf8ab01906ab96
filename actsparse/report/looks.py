"""The colours of the report, light and dark, and how each plan is drawn: the same everywhere.

Figures are drawn in light colours; the page swaps every light colour for its dark twin. The categorical colours differ
in lightness as well as hue, so they hold for the common kinds of colour blindness, and dashes and symbols repeat what
they say. Baselines are grey.
"""

from dataclasses import dataclass, replace

from actsparse.report.plans import PlanName, Role

INK, MUTED, RULE, ACCENT, PAPER = "#1a1d21", "#5b6470", "#e2e5e8", "#0b5a8f", "#fdfdfc"
GOOD, BAD = "#00694f", "#a3243b"
PLAN_COLOURS = ("#0b62a8", "#c04a12", "#007a5e", "#8e3f8a", "#8f6b00", "#147694", "#a3243c", "#4a4fb0")
RANDOM_GREY, STATIC_GREYS, ORACLE_BROWN = "#8a9099", ("#4d555f", "#6b737e", "#868d97"), "#7a5f3f"
SHARE_SCALE = ("#f1f4f7", "#cfdeea", "#9fc1da", "#649dc4", "#2f74a6", "#0a4a7c")
DEPTH = ("#1b5a9c", "#5f86ad", "#8c8c8c", "#bd8a58", "#b4500f")

DARK_TWIN = {
    INK: "#e6e8ea",
    MUTED: "#a3abb5",
    RULE: "#2c3238",
    ACCENT: "#6cb6ee",
    PAPER: "#14171a",
    GOOD: "#4fcaa6",
    BAD: "#f28a9a",
    **dict(
        zip(
            PLAN_COLOURS,
            ("#6db3f2", "#f0904f", "#42c9a2", "#d490d0", "#e0b840", "#7fd6f2", "#f28a9b", "#a5a9f5"),
            strict=True,
        )
    ),
    RANDOM_GREY: "#868e98",
    **dict(zip(STATIC_GREYS, ("#bcc4ce", "#979fa9", "#737a83"), strict=True)),
    ORACLE_BROWN: "#c9ad8a",
    **dict(zip(SHARE_SCALE, ("#1c232a", "#1f3a52", "#29587f", "#3d7fb0", "#6faedb", "#bfe0f8"), strict=True)),
    **dict(zip(DEPTH, ("#7db8f0", "#9db8d4", "#b9b9b9", "#dab48d", "#f09a58"), strict=True)),
}

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLook:
    """How a plan is drawn: its colour is its series', its dash and symbol tell the plans of a series apart."""

    colour: str
    dash: str
    symbol: str
    baseline: bool

    def opened(self) -> "PlanLook":
        """The same look with an open symbol: the plan in a second run."""
        return replace(self, symbol=f"{self.symbol.removesuffix('-open')}-open")


Looks = dict[str, PlanLook]


def looks_of(names: list[PlanName]) -> Looks:
    """The look of every plan, from all plans of all runs in order, so that a plan looks the same in every figure.

    A series (a plan without its amount) is there under its own name too, as its first plan looks.
    """
    colours, laps = _series_colours(names)
    ranks: dict[str, int] = {}
    looks: Looks = {}
    for name in names:
        if name.short in looks:
            continue
        rank = ranks.get(name.series, 0)
        ranks[name.series] = rank + 1
        looks[name.short] = PlanLook(
            colour=colours[name.series],
            dash=_dash(name.role, rank + 2 * laps[name.series]),
            symbol=_SYMBOLS[(rank + 4 * laps[name.series]) % len(_SYMBOLS)],
            baseline=name.role is not Role.METHOD,
        )
        looks.setdefault(name.series, looks[name.short])
    return looks


def _dash(role: Role, rank: int) -> str:
    fixed = {Role.RANDOM: "dot", Role.STATIC: "dash", Role.ORACLE: "dashdot", Role.DENSE: "solid"}
    return fixed.get(role, _DASHES[rank % len(_DASHES)])


def _series_colours(names: list[PlanName]) -> tuple[dict[str, str], dict[str, int]]:
    """The colour of each series, and how often all colours were used up before it (other dashes and symbols then)."""
    colours: dict[str, str] = {}
    laps: dict[str, int] = {}
    methods = statics = 0
    for name in names:
        if name.series in colours:
            continue
        laps[name.series] = methods // len(PLAN_COLOURS) if name.role is Role.METHOD else 0
        match name.role:
            case Role.DENSE:
                colour = INK
            case Role.RANDOM:
                colour = RANDOM_GREY
            case Role.ORACLE:
                colour = ORACLE_BROWN
            case Role.STATIC:
                colour, statics = STATIC_GREYS[statics % len(STATIC_GREYS)], statics + 1
            case Role.METHOD:
                colour, methods = PLAN_COLOURS[methods % len(PLAN_COLOURS)], methods + 1
        colours[name.series] = colour
    return colours, laps
