"""Studies as they are read: each experiment with its claim, what was found, and its panels as figures and tables."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

import polars as pl

from actsparse.report.figures import study as drawing
from actsparse.report.grids import Cell, Column, Grid
from actsparse.report.rows import Row
from actsparse.report.sources import Source
from actsparse.report.wording import ABSENT, exact, listed, one_line, percent, span
from actsparse.results import ClaimVerdict, PanelKind, RunKind, StudyExperiment, StudyPanel

SECTION = "studies"
HOW_TO_READ = {
    PanelKind.LINE: "Each line is a series over the horizontal axis, with its 95 % interval as a bar where one was "
    "estimated. A thin line marks a reference level. Grey and brown series are baselines.",
    PanelKind.BAR: "Each row is one case, each mark a series with its 95 % interval. Where intervals overlap, the "
    "order is not sure.",
}
PAPERS = {"pitfalls": "arXiv 2405.09274", "moyu": "arXiv 2406.12569", "tda": "arXiv 2408.11393"}
COMMANDS = {
    "pitfalls": "P1 to P5: sparsity at equal CETT, heads, KV policies over generated length, router recall by layer, "
    "quality against sparsity",
    "moyu": "M1 to M5, HU3: the trinity table, signs of gradients, uncertainty and inertia, the donor swap, "
    "a router on another domain",
    "tda": "T1 to T6: TDA against its rivals, latency, staleness, prompt length",
    "frontier": "S1, S2: all methods at equal model bytes (auto in the full form), sensitivity one layer at a time",
    "window": "S6: sensitivity to the evaluation window",
    "union": "S4: batch union of neurons and heads",
}


@dataclass(frozen=True, kw_only=True)
class PanelView:
    """One panel of an experiment: a row of the registry made on the spot, or a table."""

    row: Row | None
    frame: pl.DataFrame
    caption: str
    grid: Grid | None


@dataclass(frozen=True, kw_only=True)
class ExperimentView:
    """An experiment: the claim, the verdict on it, the sentence, and the panels that show it."""

    id: str
    name: str
    title: str
    source: str
    claim: str
    verdict: ClaimVerdict
    conclusion: str
    quick: bool
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    panels: tuple[PanelView, ...]


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """The experiments of one study run."""

    letter: str
    label: str
    study: str
    experiments: tuple[ExperimentView, ...]

    @property
    def tally(self) -> str:
        """How many claims held, did not, or stay open."""
        counts = Counter(experiment.verdict for experiment in self.experiments)
        said = {
            ClaimVerdict.HOLDS: ("holds here", "hold here"),
            ClaimVerdict.FAILS: ("does not", "do not"),
            ClaimVerdict.UNDECIDED: ("stays open", "stay open"),
        }
        parts = [f"{counts[one]} {words[counts[one] > 1]}" for one, words in said.items() if counts[one]]
        total = len(self.experiments)
        return f"Of {total} claim{'s' * (total != 1)} tested, {listed(parts)}."

    @property
    def title(self) -> str:
        """The study's name with the paper it follows."""
        name = self.study.upper() if self.study in ("moyu", "tda") else f"{self.study[:1].upper()}{self.study[1:]}"
        return name + (f", {paper}" if (paper := PAPERS.get(self.study)) else "")


def study_views(sources: tuple[Source, ...]) -> tuple[StudyView, ...]:
    """The studies of all study runs, in order, with the model's name where there are several."""
    runs = [source for source in sources if source.kind is RunKind.STUDY]
    names = {source.model_name for source in runs}
    found = []
    for source in runs:
        rows, experiments = source.table("studies"), source.experiments()
        by_study: dict[str, list[ExperimentView]] = {}
        for experiment in experiments:
            by_study.setdefault(experiment.study, []).append(_experiment(source.letter, experiment, rows))
        label = source.model_name if len(names) > 1 else ""
        found += [
            StudyView(letter=source.letter, label=label, study=one_line(study), experiments=tuple(views))
            for study, views in by_study.items()
        ]
    return tuple(found)


def _experiment(letter: str, of: StudyExperiment, rows: pl.DataFrame) -> ExperimentView:
    ours = rows.filter((pl.col("study") == of.study) & (pl.col("experiment") == of.experiment))
    name = f"{_slug(letter)}-{_slug(of.study)}-{_slug(of.experiment)}"
    panels = [_panel(f"{name}-{_slug(panel.name)}", panel, ours) for panel in of.panels]
    return ExperimentView(
        id=name,
        name=one_line(of.experiment),
        title=one_line(of.title),
        source=one_line(of.source),
        claim=one_line(of.claim),
        verdict=of.verdict,
        conclusion=one_line(of.conclusion),
        quick=of.quick,
        settings=tuple((one_line(key), one_line(value)) for key, value in of.settings.items()),
        notes=tuple(one_line(note) for note in of.notes),
        panels=tuple(panel for panel in panels if panel is not None),
    )


def _panel(name: str, panel: StudyPanel, rows: pl.DataFrame) -> PanelView | None:
    """A panel as a figure or a table; None where it has no rows."""
    frame = rows.filter(pl.col("panel") == panel.name)
    if frame.is_empty():
        return None
    if panel.kind is PanelKind.TABLE:
        return PanelView(row=None, frame=frame, caption="", grid=_table(name, panel, frame))
    caption = partial(drawing.caption, panel=panel)
    row = Row(
        id=name,
        section=SECTION,
        title=one_line(panel.title),
        needs=RunKind.STUDY,
        metrics="",
        data=lambda _: frame,
        draw=partial(drawing.draw, panel=panel),
        caption=caption,
        how_to_read=HOW_TO_READ[panel.kind],
        wide=False,
    )
    shown = frame.select("series", "x", "label", "value", "low", "high", "unit", "n", "stderr")
    return PanelView(row=row, frame=shown, caption=caption(shown), grid=None)


def _table(name: str, panel: StudyPanel, frame: pl.DataFrame) -> Grid:
    """Series by label, each cell with its interval."""
    labels = list(dict.fromkeys(frame["label"]))
    series = list(dict.fromkeys(frame["series"]))
    cells = {(row["series"], row["label"]): row for row in frame.iter_rows(named=True)}
    return Grid(
        id=f"table-{name}",
        title=one_line(panel.title),
        note=_table_note(panel, frame),
        columns=(
            Column(name=one_line(panel.x_title) or "series", numeric=False),
            *(Column(name=one_line(label)) for label in labels),
        ),
        rows=tuple((Cell(text=one_line(one)), *(_cell(cells.get((one, label))) for label in labels)) for one in series),
        keys=tuple(series),
    )


def _table_note(panel: StudyPanel, frame: pl.DataFrame) -> str:
    known = frame["value"].is_finite().sum()
    what = one_line(panel.y_title)
    parts = [f"{what}." if what and what != "value" else "", f"{known} of {frame.height} cells measured."]
    return " ".join(part for part in parts if part) + " Intervals are 95 %."


def _cell(row: dict[str, object] | None) -> Cell:
    value = row["value"] if row else None
    if row is None or not isinstance(value, float):
        return Cell(text=ABSENT)
    low, high = row["low"], row["high"]
    share = row["unit"] == "share"
    text = percent(value) if share else exact(value)
    unit = "" if share or row["unit"] in ("1", "", "count") else f" {one_line(str(row['unit']))}"
    detail = ""
    if isinstance(low, float) and isinstance(high, float):
        detail = f"{percent(low)} to {percent(high)}" if share else span(low, high)
    return Cell(text=text + unit, detail=detail, sort=value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
