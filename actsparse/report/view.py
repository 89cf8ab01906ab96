"""What a report says, computed from runs alone: frozen records that the page, the terminal and JSON all render."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from actsparse.report import grids
from actsparse.report.cards import Card, cards, headline_text
from actsparse.report.grids import Grid
from actsparse.report.looks import Looks, looks_of
from actsparse.report.notices import Notice, notices
from actsparse.report.origins import Origin, command_line, origin
from actsparse.report.panels import EvalPanel, Panel, ProfilePanel, eval_panels, profile_panels
from actsparse.report.plans import method_of, parse_plan
from actsparse.report.registry import ROWS, SECTIONS
from actsparse.report.rows import Row
from actsparse.report.samples import Sample, samples, worst_tokens
from actsparse.report.sources import Source, read_sources
from actsparse.report.studies import COMMANDS, PanelView, StudyView, study_views
from actsparse.report.verdicts import Sentence, verdicts
from actsparse.report.wording import listed, one_line
from actsparse.results import RunKind
from actsparse.specs import ReportSpec


@dataclass(frozen=True, kw_only=True)
class FigureView:
    """A figure before it is drawn: the row that draws it, the panel it shows, its numbers and the finding."""

    id: str
    row: Row
    panel: str
    frame: pl.DataFrame
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A figure that no run has the data of: its title, the metrics that it needs, and the command that makes them; or
    `why` nothing makes them for this model."""

    what: str
    shows: str
    command: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class SectionView:
    """Figures of one section, those of one row together; and what is missing from it."""

    id: str
    title: str
    figures: tuple[tuple[FigureView, ...], ...]
    missing: tuple[Missing, ...]

    @property
    def missing_by_command(self) -> dict[str, list[Missing]]:
        """What is missing under the command that makes it."""
        found: dict[str, list[Missing]] = {}
        for row in self.missing:
            if not row.why:
                found.setdefault(row.command, []).append(row)
        return found

    @property
    def undefined(self) -> list[Missing]:
        """What no command makes for this model."""
        return [row for row in self.missing if row.why]


@dataclass(frozen=True, kw_only=True)
class VerdictView:
    """The sentences of one panel."""

    panel: str
    context: str
    sentences: tuple[Sentence, ...]


@dataclass(frozen=True, kw_only=True)
class SampleView:
    panel: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class ReportView:
    """A whole report, in the order in which it is read."""

    title: str
    models: tuple[str, ...]
    made: str
    command: str
    origins: tuple[Origin, ...]
    notices: tuple[Notice, ...]
    verdicts: tuple[VerdictView, ...]
    headline: str
    cards: tuple[Card, ...]
    plan_grids: tuple[Grid, ...]
    compare: Grid | None
    sections: tuple[SectionView, ...]
    worst: tuple[Grid, ...]
    samples: tuple[SampleView, ...]
    studies: tuple[StudyView, ...]
    missing_studies: tuple[Missing, ...]
    looks: Looks

    @property
    def figures(self) -> tuple[FigureView, ...]:
        """Every figure in the order of the page."""
        of_sections = [figure for section in self.sections for row in section.figures for figure in row]
        return (*of_sections, *(figure_of(panel, study) for study, panel in self._drawn_panels()))

    def _drawn_panels(self) -> list[tuple[StudyView, PanelView]]:
        return [
            (study, panel)
            for study in self.studies
            for experiment in study.experiments
            for panel in experiment.panels
            if panel.row is not None
        ]

    @property
    def runs_said(self) -> list[tuple[str, str]]:
        """What the runs are, those of one kind and model together: `A, C` and `eval runs of demo`."""
        found: dict[tuple[str, str, bool], list[str]] = {}
        for made in self.origins:
            found.setdefault((made.kind, made.model, made.complete), []).append(made.letter)
        return [
            (", ".join(letters), f"{kind} run{'s' * (len(letters) > 1)} of {model}" + " (incomplete)" * (not complete))
            for (kind, model, complete), letters in found.items()
        ]

    @property
    def unmeasured(self) -> tuple[Missing, ...]:
        """What no run holds, over all sections."""
        found = [row for section in self.sections for row in section.missing]
        return (*found, *self.missing_studies)


def figure_of(panel: PanelView, study: StudyView) -> FigureView:
    """A drawn panel of a study as a figure."""
    assert panel.row is not None
    caption = panel.caption.replace("n = ", "n\u00a0=\u00a0")
    return FigureView(id=panel.row.id, row=panel.row, panel=study.label, frame=panel.frame, caption=caption)


def build_view(spec: ReportSpec) -> ReportView:
    """The view of the runs in `spec`; raises RunError where one cannot be read."""
    sources = read_sources(spec.runs)
    profiles, evals = profile_panels(sources), eval_panels(sources)
    figures = {row.id: _figures(row, profiles, evals) for row in ROWS}
    model = _model_argument(sources)
    models = tuple(dict.fromkeys(source.model_name for source in sources))
    studies = study_views(sources)
    return ReportView(
        title=one_line(spec.title) if spec.title else f"Activation sparsity of {listed(list(models))}",
        models=models,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=_command(spec),
        origins=tuple(origin(source) for source in sources),
        notices=notices(sources, evals),
        verdicts=tuple(_verdicts(panel) for panel in evals if panel.outcomes),
        headline=headline_text(evals),
        cards=cards(evals, profiles),
        plan_grids=tuple(grids.plan_grid(panel, place) for place, panel in enumerate(evals) if panel.outcomes),
        compare=grids.compare_grid(profiles, evals),
        sections=tuple(
            section
            for name in SECTIONS
            if (section := _section(name, figures, model, mixture=_mixture(sources))).figures or section.missing
        ),
        worst=tuple(grid for place, panel in enumerate(evals) for grid in _worst(panel, place)),
        samples=tuple(SampleView(panel=panel.label, samples=found) for panel in evals if (found := samples(panel))),
        studies=studies,
        missing_studies=_missing_studies(studies, model),
        looks=_looks(evals, studies),
    )


def _figures(row: Row, profiles: tuple[ProfilePanel, ...], evals: tuple[EvalPanel, ...]) -> tuple[FigureView, ...]:
    """The row's figure for each panel that has its data."""
    panels: tuple[Panel, ...] = profiles if row.needs is RunKind.PROFILE else evals
    if row.together:
        frame = row.data(panels) if len(panels) > 1 else pl.DataFrame()
        return () if frame.is_empty() else (_figure(row, "", frame, 0),)
    return tuple(
        _figure(row, panel.label, frame, place)
        for place, panel in enumerate(panels)
        if not (frame := row.data(panel)).is_empty()
    )


def _figure(row: Row, panel: str, frame: pl.DataFrame, place: int) -> FigureView:
    return FigureView(id=f"{row.id}-{place}", row=row, panel=panel, frame=frame, caption=_caption(row, frame))


def _section(name: str, figures: dict[str, tuple[FigureView, ...]], model: str, *, mixture: bool) -> SectionView:
    rows = [row for row in ROWS if row.section == name]
    return SectionView(
        id=name,
        title=SECTIONS[name],
        figures=tuple(figures[row.id] for row in rows if figures[row.id]),
        missing=tuple(
            _missing(row, model, row.not_of_experts if mixture else "")
            for row in rows
            if not row.optional and not figures[row.id]
        ),
    )


def _missing(row: Row, model: str, why: str) -> Missing:
    return Missing(what=row.title, shows=row.metrics, command="" if why else row.command.format(model=model), why=why)


def _mixture(sources: tuple[Source, ...]) -> bool:
    """Whether every layer of every model is a mixture of experts."""
    models = [source.manifest.model for source in sources]
    return all(one is not None and one.experts is not None and len(one.experts.layers) == one.layers for one in models)


def _caption(row: Row, frame: pl.DataFrame) -> str:
    return one_line(row.caption(frame)).replace("n = ", "n\u00a0=\u00a0")


def _verdicts(panel: EvalPanel) -> VerdictView:
    source = panel.sources[0]
    made = source.manifest.provenance
    devices = listed(list(dict.fromkeys(one_line(other.manifest.provenance.device) for other in panel.sources)))
    dtype = source.manifest.model.dtype if source.manifest.model else ""
    context = ", ".join(
        part
        for part in (source.model_name, one_line(dtype), devices, f"{made.threads} thread{'s' * (made.threads != 1)}")
        if part
    )
    return VerdictView(panel=panel.label, context=context, sentences=verdicts(panel.outcomes))


def _worst(panel: EvalPanel, place: int) -> list[Grid]:
    found = worst_tokens(panel)
    return [grids.worst_grid(found, place, panel.label, decoded=bool(panel.vocabulary))] if found else []


def _looks(evals: tuple[EvalPanel, ...], studies: tuple[StudyView, ...]) -> Looks:
    """Looks by plan, and by label where the same plan comes from a second run (open symbols there).

    Plans that only a study names follow those of the evaluations.
    """
    names = [outcome.name for panel in evals for outcome in panel.outcomes]
    looks = looks_of([*names, *(parse_plan(series) for series in _plans_of(studies))])
    for panel in evals:
        for outcome in panel.outcomes:
            if outcome.label not in looks:
                looks[outcome.label] = looks[outcome.name.short].opened()
    return looks


def _missing_studies(studies: tuple[StudyView, ...], model: str) -> tuple[Missing, ...]:
    """The studies that no run holds."""
    present = {study.study for study in studies}
    return tuple(
        Missing(what=f"study {name}", shows=shows, command=f"actsparse evaluate --model {model} --study {name} --quick")
        for name, shows in COMMANDS.items()
        if name not in present
    )


def _plans_of(studies: tuple[StudyView, ...]) -> list[str]:
    """The series of studies that are plans or methods, each once, without the model before them."""
    panels = [panel for study in studies for experiment in study.experiments for panel in experiment.panels]
    series = [one.rpartition(": ")[2] for panel in panels for one in panel.frame["series"].unique(maintain_order=True)]
    return [one for one in dict.fromkeys(series) if method_of(one)]


def _model_argument(sources: tuple[Source, ...]) -> str:
    model = sources[0].manifest.model
    return command_line((model.requested,)) if model else "MODEL"


def _command(spec: ReportSpec) -> str:
    output = () if spec.output == Path("report.html") else ("--output", str(spec.output))
    return command_line(("actsparse", "report", *(str(run) for run in spec.runs), *output))
