"""Lines, points and bands with their intervals, drawn the same way everywhere."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import floats, plain

Known = Sequence[float | None] | pl.Series


def ends(value: Known, low: Known, high: Known, colour: str) -> dict[str, Any] | None:
    """Asymmetric error bars; None where no interval is known. A point without one gets no bar."""
    rows = list(zip(value, low, high, strict=True))
    if all(bottom is None or top is None for _, bottom, top in rows):
        return None

    def gap(one: float | None, other: float | None) -> float:
        return 0.0 if one is None or other is None else max(0.0, one - other)

    return {
        "type": "data",
        "symmetric": False,
        "array": floats(gap(top, middle) for middle, _, top in rows),
        "arrayminus": floats(gap(middle, bottom) for middle, bottom, _ in rows),
        "thickness": 1.2,
        "width": 0,
        "color": colour,
    }


def add_line(
    figure: go.Figure,
    frame: pl.DataFrame,
    *,
    x: str,
    y: str,
    name: str,
    colour: str,
    hover: str,
    dash: str = "solid",
    width: float = 1.9,
    symbol: str = "circle",
    markers: bool = True,
    faint: bool = False,
    subplot: str = "",
) -> None:
    """The frame's `y` over its `x`, with bars from its columns `low` and `high` where it has them. Null is a gap."""
    bars = ends(frame[y], frame["low"], frame["high"], colour) if {"low", "high"} <= set(frame.columns) else None
    figure.add_scatter(
        x=floats(frame[x]),
        y=floats(frame[y]),
        error_y=None if faint else bars,
        mode="lines+markers" if markers and not faint else "lines",
        name=plain(name),
        showlegend=not faint,
        opacity=0.25 if faint else 1,
        line={"color": colour, "width": 1 if faint else width, "dash": dash},
        marker={"size": 5, "color": colour, "symbol": symbol},
        hovertemplate=f"{hover}<extra>{plain(name)}</extra>",
        xaxis=f"x{subplot}",
        yaxis=f"y{subplot}",
    )


def add_dots(
    figure: go.Figure,
    frame: pl.DataFrame,
    *,
    labels: str,
    value: str,
    name: str,
    colour: str,
    hover: str,
    symbol: str = "circle",
    legend: bool = True,
) -> None:
    """One dot a label with its interval along x; labels stand on the y axis."""
    figure.add_scatter(
        x=floats(frame[value]),
        y=[plain(label) for label in frame[labels]],
        error_x=ends(frame[value], frame["low"], frame["high"], colour),
        mode="markers",
        name=plain(name),
        showlegend=legend,
        marker={"size": 9, "color": colour, "symbol": symbol, "line": {"width": 1.5, "color": colour}},
        hovertemplate=f"%{{y}}: {hover}<extra>{plain(name)}</extra>",
        cliponaxis=False,
    )


def label_axis() -> dict[str, Any]:
    """A y axis of names, first on top."""
    return {"autorange": "reversed", "type": "category", "ticks": "", "showline": False, "showgrid": True}


def log2_axis() -> dict[str, Any]:
    """An axis of powers of two."""
    return {"type": "log", "dtick": 0.30103, "tickformat": "d"}
