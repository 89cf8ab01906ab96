"""What an experiment of a study found: rows, panels, and the verdict on a paper's claim."""

from dataclasses import dataclass, field
from enum import StrEnum


class ClaimVerdict(StrEnum):
    """Whether what a paper claims was found on this model; `undecided` where the interval leaves it open."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


class PanelKind(StrEnum):
    """How the rows of a panel are meant to be drawn: `line` over x, `bar` over labels, `table` of series by label."""

    LINE = "line"
    BAR = "bar"
    TABLE = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One row of `studies.parquet`: a point of one series in one panel of an experiment.

    `x` is the place on a numeric axis (None where `label` is the place); `low` and `high` bound the 95 % interval.
    """

    study: str
    experiment: str
    panel: str
    series: str
    x: float | None
    label: str
    value: float | None
    unit: str
    n: int
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPanel:
    """One figure or table of an experiment; titles of the axes carry their units.

    `layers`: x counts layers. `log_x`, `log_y`: axes that are meant to be logarithmic. `reference`: a level to draw
    (dense, chance).
    """

    name: str
    title: str
    kind: PanelKind
    x_title: str
    y_title: str
    layers: bool = False
    log_x: bool = False
    log_y: bool = False
    reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyExperiment:
    """One experiment of a study: what the paper claims, what was found, and how it is drawn.

    `conclusion` is one sentence with the number and its interval, which `value`, `low`, `high` and `unit` repeat.
    `quick` says that it ran at the small size. `settings` are the sizes that it ran at; `notes` what weakens it.
    """

    study: str
    experiment: str
    title: str
    source: str
    claim: str
    conclusion: str
    verdict: ClaimVerdict
    value: float | None
    low: float | None
    high: float | None
    unit: str
    quick: bool
    panels: tuple[StudyPanel, ...]
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
