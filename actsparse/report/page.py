"""The page: one HTML file with everything inside, under a Content-Security-Policy that allows nothing else.

Scripts are allowed by hash. plotly.js is kept compressed and inflated in the browser into a `blob:` script, so that the
file stays small; figures and their numbers are compressed JSON in a script element that is data, not code.
"""

import base64
import hashlib
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from actsparse import __version__
from actsparse.errors import ActsparseError
from actsparse.report.bundle import VERSION as PLOTLY_VERSION
from actsparse.report.bundle import compressed_plotly
from actsparse.report.economy import ECONOMIES, Economy
from actsparse.report.looks import DARK_TWIN
from actsparse.report.payloads import Drawing, drawing, embedded, packed, payload
from actsparse.report.studies import ExperimentView, StudyView
from actsparse.report.view import FigureView, ReportView, SectionView, figure_of
from actsparse.report.wording import clean

LARGEST = 6_000_000
SCRIPTS = ("draw.js", "tables.js", "report.js")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure ready for the page: whether it takes the whole width, its height, the choices of its menu."""

    view: FigureView
    wide: bool
    height: int
    choice_name: str
    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnExperiment:
    """An experiment with its figures, placed."""

    view: ExperimentView
    figures: tuple[Drawn, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnStudy:
    view: StudyView
    experiments: tuple[DrawnExperiment, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnSection:
    view: SectionView
    figures: tuple[Drawn, ...]


def render(view: ReportView, largest: int = LARGEST) -> str:
    """The whole report as HTML of at most `largest` bytes; what had to be left out for that is among its warnings.

    Raises ActsparseError where even the least of the runs does not fit.
    """
    return fitted(view, drawings_of(view), largest)


def drawings_of(view: ReportView) -> dict[str, Drawing]:
    """Every figure of the view drawn, by its id: most of the time that a page takes."""
    return {figure.id: drawing(figure, view.looks) for figure in view.figures}


def fitted(view: ReportView, drawings: dict[str, Drawing], largest: int) -> str:
    """The page with as little left out as `largest` bytes allow."""
    for economy in ECONOMIES:
        page = _page(economy.reduced(view), drawings, economy)
        if len(page.encode("utf-8", errors="replace")) <= largest:
            return page
    raise ActsparseError(
        f"these {len(view.origins)} runs do not fit into a page of {largest / 1e6:g} MB",
        "report on fewer runs at once",
    )


def render_figure(figure: FigureView, view: ReportView) -> str:
    """One figure as a page that stands by itself, with its caption, help, numbers and plotly.js inside."""
    drawn = drawing(figure, view.looks)
    title = f"{figure.row.title}, {figure.panel}" if figure.panel else figure.row.title
    return _filled(
        "figure.html.jinja",
        view,
        title=title,
        figure=replace(_drawn(figure, drawn), wide=True),
        figures_packed=packed([payload(figure, drawn, Economy())]),
    )


def _page(view: ReportView, drawings: dict[str, Drawing], economy: Economy) -> str:
    sections = tuple(_section(section, drawings) for section in view.sections if section.figures)
    absent = tuple(section for section in view.sections if not section.figures)
    return _filled(
        "page.html.jinja",
        view,
        sections=sections,
        studies=tuple(_study(study, drawings) for study in view.studies),
        absent=absent,
        absent_by_command=_by_command(view, absent),
        contents=_contents(view, sections, absent),
        no_verdict=_no_verdict(view),
        figures_packed=packed([payload(figure, drawings[figure.id], economy) for figure in view.figures]),
    )


def _filled(template: str, view: ReportView, **values: Any) -> str:
    """The template with what every page holds: policy, style, scripts, plotly.js."""
    early = _asset("theme.js")
    script = "\n".join(['(() => {\n"use strict";', *map(_asset, SCRIPTS), "})();"])
    environment = Environment(
        loader=PackageLoader("actsparse.report", "."),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        view=view,
        policy=policy(early, script),
        style=Markup(_asset("report.css")),
        early_script=Markup(early),
        script=Markup(script),
        twin=DARK_TWIN,
        twin_json=embedded(DARK_TWIN),
        plotly=Markup(compressed_plotly()),
        plotly_version=PLOTLY_VERSION,
        version=__version__,
        **values,
    )


def policy(*scripts: str) -> str:
    """The Content-Security-Policy that allows exactly these inline scripts, the inflated plotly.js, and no network."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes} blob:; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _section(section: SectionView, drawings: dict[str, Drawing]) -> DrawnSection:
    rows = [[_drawn(figure, drawings[figure.id]) for figure in row] for row in section.figures]
    return DrawnSection(view=section, figures=tuple(_placed(rows)))


def _study(study: StudyView, drawings: dict[str, Drawing]) -> DrawnStudy:
    experiments = []
    for experiment in study.experiments:
        views = [figure_of(panel, study) for panel in experiment.panels if panel.row is not None]
        figures = [_drawn(view, drawings[view.id]) for view in views]
        experiments.append(DrawnExperiment(view=experiment, figures=tuple(_placed([[one] for one in figures]))))
    return DrawnStudy(view=study, experiments=tuple(experiments))


def _placed(rows: list[list[Drawn]]) -> list[Drawn]:
    """The figures in order; a half one without a neighbour takes the whole width.

    The panels of one row are compared, so they start a line of their own.
    """
    placed: list[Drawn] = []
    waiting = False
    for row in rows:
        for place, drawn in enumerate(row):
            if waiting and (drawn.wide or (place == 0 and len(row) > 1)):
                placed[-1], waiting = replace(placed[-1], wide=True), False
            placed.append(drawn)
            waiting = not drawn.wide and not waiting
    if waiting:
        placed[-1] = replace(placed[-1], wide=True)
    return placed


def _drawn(figure: FigureView, drawn: Drawing) -> Drawn:
    layout = drawn["layout"]
    variants = (layout.get("meta") or {}).get("variants") or {"name": "", "choices": []}
    return Drawn(
        view=figure,
        wide=figure.row.wide,
        height=int(layout.get("height", 340)),
        choice_name=variants["name"],
        choices=tuple(choice["label"] for choice in variants["choices"]),
    )


def _cleaned(value: Any) -> Any:
    """What the template prints, without control characters; autoescape follows."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _by_command(view: ReportView, absent: tuple[SectionView, ...]) -> dict[str, list[str]]:
    """What the empty sections would show, and the studies where none was run, under the command that measures it."""
    found: dict[str, list[str]] = {}
    for row in [row for section in absent for row in section.missing if row.command]:
        found.setdefault(row.command, []).append(row.what)
    for row in view.missing_studies if not view.studies else ():
        found.setdefault(row.command, []).append(row.shows)
    return found


def _contents(
    view: ReportView, sections: tuple[DrawnSection, ...], absent: tuple[SectionView, ...]
) -> list[tuple[str, str]]:
    found = {section.view.id: section.view.title for section in sections}
    first = [("summary", "Summary"), *([("frontier", found.pop("frontier"))] if "frontier" in found else [])]
    plans = [("plans", "Every plan in numbers")] if view.plan_grids or view.compare else []
    last = [
        *([("studies", "What the papers claim")] if view.studies else []),
        *([("samples", "What it writes")] if view.samples else []),
        *([("absent", "Not measured here")] if absent or not view.studies else []),
        ("origins", "Where the numbers come from"),
    ]
    return [*first, *plans, *found.items(), *last]


def _no_verdict(view: ReportView) -> str:
    models = ", ".join(view.models)
    return (
        f"These runs describe {models} but hold no finished evaluation, so there is no verdict on quality or speed yet."
    )


def _asset(name: str) -> str:
    return files("actsparse.report").joinpath(name).read_text(encoding="utf-8").strip()
