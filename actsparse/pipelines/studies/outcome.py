"""What an experiment builds: rows, panels, and one sentence that says whether the claim held."""

from dataclasses import dataclass, field

from actsparse.core.bootstrap import Interval
from actsparse.results import ClaimVerdict, PanelKind, StudyExperiment, StudyPanel, StudyRow

DECIMALS = 3


@dataclass(frozen=True)
class Experiment:
    """What an experiment is called and asks: its short name, title, the paper and what it claims."""

    study: str
    name: str
    title: str
    source: str
    claim: str


@dataclass(frozen=True)
class Conclusion:
    """One sentence, the verdict on the claim, and the number that it rests on."""

    sentence: str
    verdict: ClaimVerdict
    number: Interval | None = None
    unit: str = "1"


@dataclass
class Outcome:
    """An experiment at work: what it has shown so far."""

    of: Experiment
    quick: bool
    settings: dict[str, str] = field(default_factory=dict)
    rows: list[StudyRow] = field(default_factory=list)
    panels: list[StudyPanel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conclusion: Conclusion | None = None

    def panel(
        self, name: str, title: str, kind: PanelKind, x: str, y: str, *,
        layers: bool = False, log_x: bool = False, log_y: bool = False, reference: float | None = None,
    ) -> None:  # fmt: skip
        """Open a figure or table; rows name it."""
        self.panels.append(
            StudyPanel(
                name=name, title=title, kind=kind, x_title=x, y_title=y, layers=layers, log_x=log_x, log_y=log_y,
                reference=reference,
            )
        )  # fmt: skip

    def add(
        self, panel: str, series: str, found: Interval | float | None, unit: str, *, x: float | None = None,
        label: str = "", n: int | None = None,
    ) -> None:  # fmt: skip
        """One point of a series; a number alone has no interval."""
        interval = (
            found if isinstance(found, Interval) else Interval(value=found, low=None, high=None, n=1, stderr=None)
        )
        self.rows.append(
            StudyRow(
                study=self.of.study, experiment=self.of.name, panel=panel, series=series, x=x, label=label,
                value=interval.value, unit=unit, n=interval.n if n is None else n, stderr=interval.stderr,
                low=interval.low, high=interval.high,
            )
        )  # fmt: skip

    def conclude(self, sentence: str, verdict: ClaimVerdict, number: Interval | None = None, unit: str = "1") -> None:
        """Say in one sentence what was found."""
        self.conclusion = Conclusion(sentence, verdict, number, unit)

    def record(self) -> StudyExperiment:
        """The experiment as it is written."""
        assert self.conclusion is not None
        number = self.conclusion.number or Interval(value=None, low=None, high=None, n=0, stderr=None)
        return StudyExperiment(
            study=self.of.study,
            experiment=self.of.name,
            title=self.of.title,
            source=self.of.source,
            claim=self.of.claim,
            conclusion=f"Quick: {self.conclusion.sentence}" if self.quick else self.conclusion.sentence,
            verdict=self.conclusion.verdict,
            value=number.value,
            low=number.low,
            high=number.high,
            unit=self.conclusion.unit,
            quick=self.quick,
            panels=tuple(self.panels),
            settings=self.settings,
            notes=tuple(self.notes),
        )


def below(found: Interval, limit: float) -> ClaimVerdict:
    """`holds` where the whole interval is at most `limit`, `does not hold` where it is all above it."""
    if found.low is None or found.high is None:
        return ClaimVerdict.UNDECIDED
    if found.high <= limit:
        return ClaimVerdict.HOLDS
    return ClaimVerdict.FAILS if found.low > limit else ClaimVerdict.UNDECIDED


def above(found: Interval, limit: float) -> ClaimVerdict:
    """`holds` where the whole interval is over `limit`, `does not hold` where it is all at or below it."""
    if found.low is None or found.high is None:
        return ClaimVerdict.UNDECIDED
    if found.low > limit:
        return ClaimVerdict.HOLDS
    return ClaimVerdict.FAILS if found.high <= limit else ClaimVerdict.UNDECIDED


def shown(found: Interval, unit: str = "", decimals: int = DECIMALS) -> str:
    """`0.123 nats [0.100, 0.150]`; what is not known is left out."""
    if found.value is None:
        return "unknown"
    text = f"{found.value:.{decimals}f}{unit}"
    if found.low is None or found.high is None:
        return f"{text} (no interval)"
    return f"{text} [{found.low:.{decimals}f}, {found.high:.{decimals}f}]"


def points(found: Interval) -> str:
    """A difference of shares as `12.3 points [10.0, 15.0]`."""
    return percent(found, " points")


def percent(found: Interval, unit: str = " %") -> str:
    """A share as `12.3 % [10.0, 15.0]`."""
    parts = (None if v is None else 100 * v for v in (found.value, found.low, found.high))
    value, low, high = parts
    return shown(Interval(value=value, low=low, high=high, n=found.n, stderr=None), unit, 1)
