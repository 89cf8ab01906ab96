"""Figures one by one: a standalone HTML file and a CSV of the numbers each, beside one shared plotly.js."""

from io import StringIO
from pathlib import Path

import polars as pl
from markupsafe import escape

from actsparse.errors import ActsparseError
from actsparse.report.bundle import plotly_js
from actsparse.report.view import FigureView, ReportView
from actsparse.report.wording import clean
from actsparse.store.files import disk_error, write_bytes

SHARED = "plotly.min.js"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><script src="{shared}"></script></head>
<body style="font-family:sans-serif;max-width:60rem;margin:2rem auto"><h1 style="font-size:1.1rem">{title}</h1>
{body}<p>{caption}</p></body></html>
"""


def export_figures(view: ReportView, directory: Path, *, force: bool = False) -> tuple[Path, ...]:
    """The HTML and CSV files written into `directory`, in the order of the report.

    Raises ActsparseError where one of them exists (without `force`) or cannot be written.
    """
    figures = view.figures
    paths = [directory / f"{figure.id}.{ending}" for figure in figures for ending in ("html", "csv")]
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not force:
        raise ActsparseError(f"{there} exists", "overwrite it with --force, or choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(directory, error) from None
    write_bytes(directory / SHARED, plotly_js().encode())
    for figure in figures:
        write_bytes(directory / f"{figure.id}.html", standalone(figure, view).encode())
        write_bytes(directory / f"{figure.id}.csv", csv_of(figure.frame).encode())
    return tuple(paths)


def standalone(figure: FigureView, view: ReportView) -> str:
    """A figure with its caption as a page of its own that loads `plotly.min.js` from its folder."""
    from plotly.io import to_html

    drawn = figure.row.draw(figure.frame, view.looks)
    body = to_html(drawn, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
    title = f"{figure.row.title}, {figure.panel}" if figure.panel else figure.row.title
    return _PAGE.format(title=escape(title), shared=SHARED, body=body, caption=escape(figure.caption))


def csv_of(frame: pl.DataFrame) -> str:
    """A frame as CSV; text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    texts = [name for name, kind in frame.schema.items() if kind == pl.String]
    safe = frame.with_columns(pl.col(name).map_elements(_inert, return_dtype=pl.String) for name in texts)
    buffer = StringIO()
    safe.write_csv(buffer)
    return buffer.getvalue()


def _inert(text: str) -> str:
    cleaned = clean(text)
    return f"'{cleaned}" if cleaned.startswith(("=", "+", "-", "@", "\t")) else cleaned
