"""The view model as one JSON document: what `actsparse report --json` prints."""

from dataclasses import asdict
from typing import Any

from actsparse.report.payloads import columns, finite
from actsparse.report.studies import StudyView
from actsparse.report.view import FigureView, ReportView


def document(view: ReportView) -> dict[str, Any]:
    """The report as dicts, lists, numbers and strings; not-a-number and infinities are null."""
    return finite(
        {
            "title": view.title,
            "models": list(view.models),
            "made": view.made,
            "command": view.command,
            "warnings": [asdict(notice) for notice in view.notices],
            "verdicts": [asdict(group) for group in view.verdicts],
            "headline": view.headline,
            "cards": [asdict(card) for card in view.cards],
            "tables": [
                asdict(grid) for grid in (*([view.compare] if view.compare else []), *view.plan_grids, *view.worst)
            ],
            "figures": [_figure(figure) for figure in view.figures],
            "studies": [_study(study) for study in view.studies],
            "samples": [asdict(group) for group in view.samples],
            "not_measured": [asdict(row) for row in view.unmeasured],
            "runs": [asdict(made) for made in view.origins],
        }
    )


def _study(study: StudyView) -> dict[str, Any]:
    return {
        "run": study.letter,
        "study": study.study,
        "tally": study.tally,
        "experiments": [
            {
                "experiment": one.name, "title": one.title, "source": one.source, "claim": one.claim,
                "verdict": one.verdict.value, "conclusion": one.conclusion, "quick": one.quick,
                "settings": dict(one.settings), "notes": list(one.notes),
                "figures": [panel.row.id for panel in one.panels if panel.row is not None],
                "tables": [asdict(panel.grid) for panel in one.panels if panel.grid is not None],
            }
            for one in study.experiments
        ],
    }  # fmt: skip


def _figure(figure: FigureView) -> dict[str, Any]:
    row = figure.row
    return {
        "id": figure.id, "section": row.section, "title": row.title, "panel": figure.panel, "caption": figure.caption,
        "how_to_read": row.how_to_read, "columns": columns(figure.frame),
    }  # fmt: skip
