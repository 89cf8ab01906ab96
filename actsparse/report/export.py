"""Figures one by one: an HTML file that opens by itself and a CSV of the numbers each."""

from io import StringIO
from pathlib import Path

import polars as pl

from actsparse.errors import ActsparseError
from actsparse.report.page import render_figure
from actsparse.report.view import ReportView
from actsparse.report.wording import clean
from actsparse.store.files import disk_error, write_bytes


def export_figures(view: ReportView, directory: Path, *, force: bool = False) -> tuple[Path, ...]:
    """The HTML and CSV files written into `directory`, in the order of the report.

    Raises ActsparseError where one of them exists (without `force`) or cannot be written.
    """
    figures = view.figures
    paths = refuse_existing(view, directory, force=force)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(directory, error) from None
    for figure in figures:
        write_bytes(directory / f"{figure.id}.html", render_figure(figure, view).encode("utf-8", errors="replace"))
        write_bytes(directory / f"{figure.id}.csv", csv_of(figure.frame).encode())
    return tuple(paths)


def refuse_existing(view: ReportView, directory: Path, *, force: bool) -> list[Path]:
    """The files that an export into `directory` writes; raises ActsparseError where it would replace something."""
    paths = [directory / f"{figure.id}.{ending}" for figure in view.figures for ending in ("html", "csv")]
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not force:
        raise ActsparseError(f"{there} exists", "overwrite it with --force, or choose another directory")
    return paths


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
