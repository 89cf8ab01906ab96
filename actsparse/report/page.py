"""The page: one HTML file with everything inside, under a Content-Security-Policy that allows nothing else.

Scripts are allowed by hash. plotly.js is kept compressed and inflated in the browser into a `blob:` script, so that the
file stays small; figures and their numbers are JSON in script elements that are data, not code.
"""

import base64
import hashlib
import json
import math
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from actsparse import __version__
from actsparse.report.bundle import VERSION as PLOTLY_VERSION
from actsparse.report.bundle import compressed_plotly
from actsparse.report.looks import DARK_TWIN, Looks
from actsparse.report.studies import ExperimentView, StudyView
from actsparse.report.view import FigureView, ReportView, SectionView, figure_of
from actsparse.report.wording import clean

DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure ready for the page: its JSON, height, whether it takes the whole width, the choices of its menu."""

    view: FigureView
    wide: bool
    json: Markup
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


def render(view: ReportView) -> str:
    """The whole report as HTML."""
    sections = tuple(_section(section, view.looks) for section in view.sections)
    studies = tuple(_study(study, view.looks) for study in view.studies)
    payloads = [drawn for section in sections for drawn in section.figures]
    payloads += [drawn for study in studies for experiment in study.experiments for drawn in experiment.figures]
    early, script = _asset("theme.js"), _asset("report.js")
    environment = Environment(
        loader=PackageLoader("actsparse.report", "."),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        view=view,
        sections=sections,
        studies=studies,
        payloads=payloads,
        contents=_contents(view, sections),
        no_verdict=_no_verdict(view),
        policy=policy(early, script),
        style=Markup(_asset("report.css")),
        early_script=Markup(early),
        script=Markup(script),
        twin=DARK_TWIN,
        twin_json=embedded(DARK_TWIN),
        plotly=Markup(compressed_plotly()),
        plotly_version=PLOTLY_VERSION,
        version=__version__,
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


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: no `<`, no line separators, no NaN."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def columns(frame: pl.DataFrame) -> dict[str, list[Any]]:
    """A frame's columns as lists, numbers rounded, text cleaned: the CSV of a figure."""
    return {name: [_rounded(value) for value in frame[name].to_list()] for name in frame.columns}


def _section(section: SectionView, looks: Looks) -> DrawnSection:
    rows = [[_drawn(figure, looks) for figure in row] for row in section.figures]
    return DrawnSection(view=section, figures=tuple(_placed(rows)))


def _study(study: StudyView, looks: Looks) -> DrawnStudy:
    experiments = []
    for experiment in study.experiments:
        figures = [_drawn(figure_of(panel, study), looks) for panel in experiment.panels if panel.row is not None]
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


def _drawn(figure: FigureView, looks: Looks) -> Drawn:
    drawn = figure.row.draw(figure.frame, looks).to_plotly_json()
    layout = json.loads(_plotly_json(drawn["layout"]))
    variants = (layout.get("meta") or {}).get("variants") or {"name": "", "choices": []}
    payload = {
        "name": figure.id,
        "data": json.loads(_plotly_json(drawn["data"])),
        "layout": layout,
        "columns": columns(figure.frame),
    }
    return Drawn(
        view=figure,
        wide=figure.row.wide,
        json=embedded(payload),
        height=int(layout.get("height", 340)),
        choice_name=variants["name"],
        choices=tuple(choice["label"] for choice in variants["choices"]),
    )


def _plotly_json(value: Any) -> str:
    from plotly.io.json import to_json_plotly

    return str(to_json_plotly(value, engine="json"))


def _cleaned(value: Any) -> Any:
    """What the template prints, without control characters; autoescape follows."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _contents(view: ReportView, sections: tuple[DrawnSection, ...]) -> list[tuple[str, str]]:
    found = {section.view.id: section.view.title for section in sections}
    first = [("summary", "Summary"), *([("frontier", found.pop("frontier"))] if "frontier" in found else [])]
    plans = [("plans", "Every plan in numbers")] if view.plan_grids or view.compare else []
    last = [
        ("studies", "What the papers claim"),
        *([("samples", "What it writes")] if view.samples else []),
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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return clean(value) if isinstance(value, str) else value


def finite(value: Any) -> Any:
    """The value with NaN and infinities as null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
