"""A panel of a study's experiment: lines over x, or bars over labels, with intervals."""

import math
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, floats, log_axis, plain, titled
from actsparse.report.figures.columns import as_float
from actsparse.report.figures.marks import ends, label_axis
from actsparse.report.looks import PLAN_COLOURS, Looks, PlanLook
from actsparse.report.plans import method_of
from actsparse.report.wording import count, exact, listed, percent, short, span
from actsparse.results import PanelKind, StudyPanel

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


def looks_in(frame: pl.DataFrame, looks: Looks) -> Looks:
    """The look of every series: that of the plan it names, else a colour that no plan of this panel has.

    `model: plan` and `plan: what` take the plan's colour, and a dash by the rest.
    """
    series = list(dict.fromkeys(frame["series"]))
    found: Looks = {}
    others: list[str] = []
    for name in series:
        before, _, after = name.rpartition(": ")
        look = _of_plan(looks, after)
        other = before if look is not None else after
        look = look or (_of_plan(looks, before) if before else None)
        if look is not None:
            if other and before and other not in others:
                others.append(other)
            place = others.index(other) if before else 0
            found[name] = replace(look, dash=DASHES[place % 4], symbol=SYMBOLS[place % 8]) if before else look
    taken = {look.colour for look in found.values()}
    free = [colour for colour in PLAN_COLOURS if colour not in taken] or list(PLAN_COLOURS)
    for place, name in enumerate(name for name in series if name not in found):
        found[name] = PlanLook(
            colour=free[place % len(free)],
            dash=DASHES[(place // len(free)) % len(DASHES)],
            symbol=SYMBOLS[place % len(SYMBOLS)],
            baseline=False,
        )
    return found


def _of_plan(looks: Looks, name: str) -> PlanLook | None:
    return looks.get(name) or looks.get(method_of(name))


def draw(frame: pl.DataFrame, looks: Looks, panel: StudyPanel) -> go.Figure:
    """The panel as it asks to be drawn; rows without a value are gaps.

    Lines that were measured at one place alone are drawn as rows. What counts in another unit than the first row
    stands in the numbers only.
    """
    rows = _in_one_unit(frame)
    if panel.kind is not PanelKind.LINE:
        return _bars(rows, looks, panel)
    if rows["x"].drop_nulls().n_unique() > 1:
        return _lines(rows, looks, panel)
    where = rows["x"].drop_nulls()
    at = f"{panel.x_title}: {short(as_float(where[0]))}" if len(where) else panel.x_title
    return _bars(rows.with_columns(label="series"), looks, replace(panel, x_title=at))


def _in_one_unit(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("unit") == frame["unit"][0])


def _lines(frame: pl.DataFrame, looks: Looks, panel: StudyPanel) -> go.Figure:
    x_axis = _log(frame, ("x",)) if panel.log_x else {"dtick": _layer_step(frame)} if panel.layers else {}
    figure = canvas(
        x=titled(panel.x_title),
        y=titled(panel.y_title),
        height=380,
        x_axis=x_axis,
        y_axis=_value_axis(frame, log=panel.log_y),
    )
    own = looks_in(frame, looks)
    points = frame.filter(pl.col("x").is_not_null()).sort("x")
    for name in dict.fromkeys(frame["series"]):
        rows, look = points.filter(pl.col("series") == name), own[name]
        if rows.is_empty():
            continue
        figure.add_scatter(
            x=floats(rows["x"]),
            y=floats(rows["value"]),
            error_y=ends(rows["value"], rows["low"], rows["high"], look.colour),
            mode="lines+markers",
            name=plain(name),
            line={"color": look.colour, "width": 1.4 if look.baseline else 2, "dash": look.dash},
            marker={"size": 6, "color": look.colour, "symbol": look.symbol},
            hovertemplate=f"%{{x:.4~g}}: %{{y:.4~g}}<extra>{plain(name)}</extra>",
        )
    if panel.reference is not None:
        add_reference(figure, y=panel.reference, text=short(panel.reference))
    return figure


def _value_axis(frame: pl.DataFrame, *, log: bool) -> dict[str, Any]:
    if log:
        return _log(frame, ("value", "low", "high"))
    return {"tickformat": ".3~p"} if set(frame["unit"]) == {"share"} else {}


def _log(frame: pl.DataFrame, columns: tuple[str, ...]) -> dict[str, Any]:
    """A logarithmic axis with readable ticks around the values of the columns."""
    known = [value for column in columns for value in frame[column].drop_nulls() if 0 < value < math.inf]
    return log_axis(min(known) * 0.9, max(known) * 1.12) if known else {"type": "log"}


def _layer_step(frame: pl.DataFrame) -> int:
    layers = frame["x"].n_unique()
    return next((step for step in (1, 2, 5, 10) if layers <= 12 * step), 20)


def _bars(frame: pl.DataFrame, looks: Looks, panel: StudyPanel) -> go.Figure:
    """Dots with intervals on a line a label: a bar would have to start at a zero that a log axis has not."""
    own = looks_in(frame, looks)
    labels = list(dict.fromkeys(frame["label"]))
    single = len(dict.fromkeys(frame["series"])) == 1 or frame["label"].equals(frame["series"])
    figure = canvas(
        x=titled(panel.y_title),
        y=titled(panel.x_title),
        height=110 + 30 * max(2, len(labels)),
        x_axis=_value_axis(frame, log=panel.log_y),
        y_axis=label_axis(),
    )
    for name in dict.fromkeys(frame["series"]):
        rows, look = frame.filter((pl.col("series") == name) & pl.col("value").is_not_null()), own[name]
        if rows.is_empty():
            continue
        figure.add_scatter(
            x=floats(rows["value"]),
            y=[plain(label) for label in rows["label"]],
            error_x=ends(rows["value"], rows["low"], rows["high"], look.colour),
            mode="markers",
            name=plain(name),
            showlegend=not single,
            marker={"size": 10, "color": look.colour, "symbol": look.symbol},
            hovertemplate=f"%{{y}}: %{{x:.4~g}}<extra>{plain(name)}</extra>",
            cliponaxis=False,
        )
    figure.update_yaxes(categoryorder="array", categoryarray=[plain(label) for label in labels])
    if panel.reference is not None:
        add_reference(figure, x=panel.reference)
    return figure


def caption(frame: pl.DataFrame, panel: StudyPanel) -> str:
    """The lowest and highest point of a bar panel, or where the lines of a line panel end; and what was left empty."""
    shown = _in_one_unit(frame)
    known = shown.filter(pl.col("value").is_finite())
    if known.is_empty():
        return "Nothing could be measured here."
    text = _line_finding(known, layers=panel.layers) if panel.kind is PanelKind.LINE else _bar_finding(known)
    missing = shown.height - known.height
    text += f" {missing} point{'s' * (missing > 1)} could not be measured." if missing else ""
    most, least = known["n"].max(), known["n"].min()
    if isinstance(most, int) and isinstance(least, int) and most > 1:
        text += f" n = {count(most)} a point." if most == least else f" n = {count(least)} to {count(most)} a point."
    others = list(dict.fromkeys(frame.filter(pl.col("unit") != frame["unit"][0])["series"]))
    text += f" In the numbers too: {listed(others)}." if others else ""
    return text


def _bar_finding(known: pl.DataFrame) -> str:
    ordered = known.sort("value")
    low, high = ordered.row(0, named=True), ordered.row(-1, named=True)
    many = known["series"].n_unique() > 1
    if ordered.height == 1:
        return f"{_who(low, many)}: {_amount(low)}."
    apart = _apart(low, high)
    return f"Lowest is {_who(low, many)}, {_amount(low)}; highest {_who(high, many)}, {_amount(high)}{apart}."


def _apart(low: dict[str, object], high: dict[str, object]) -> str:
    """Says where the intervals of the extremes overlap: then the order is not sure."""
    top, bottom = low["high"], high["low"]
    if isinstance(top, float) and isinstance(bottom, float) and top >= bottom:
        return "; their intervals overlap"
    return ""


def _line_finding(known: pl.DataFrame, *, layers: bool) -> str:
    points = known.drop_nulls("x").sort("x")
    if points.is_empty():
        return "No point has a place on the axis."
    end = as_float(points["x"].max())
    last = points.group_by("series", maintain_order=True).last().sort("value")
    if last.height == 1:
        first, final = points.row(0, named=True), points.row(-1, named=True)
        moved = f"from {_amount(first)} at {short(first['x'])} to {_amount(final)} at {short(final['x'])}"
        return f"{final['series']} goes {moved}."
    at_end = last.filter(pl.col("x") == end)
    shown = at_end if at_end.height > 1 else last
    low, high = shown.row(0, named=True), shown.row(-1, named=True)
    where = f"{'In layer' if layers else 'At'} {short(end)}" if at_end.height > 1 else "At its last point each"
    return f"{where}, {low['series']} is lowest, {_amount(low)}, and {high['series']} highest, {_amount(high)}."


def _who(row: dict[str, object], many: bool) -> str:
    label = str(row["label"] or row["series"])
    return f"{label} ({row['series']})" if many and row["label"] else label


def _amount(row: dict[str, object]) -> str:
    """A value with its interval, shares as per cent."""
    value, low, high = (as_float(row[key]) for key in ("value", "low", "high"))
    if row["unit"] == "share":
        interval = f" ({percent(low)} to {percent(high)})" if low == low and high == high else ""
        return f"{percent(value)}{interval}"
    unit = "" if row["unit"] in ("1", "") else f" {row['unit']}"
    interval = span(low, high) if low == low and high == high else ""
    return f"{exact(value)}{unit}" + (f" ({interval})" if interval else "")
