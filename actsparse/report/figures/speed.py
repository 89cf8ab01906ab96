"""Measured decode speed-up beside the ceiling that the unread bytes allow."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, floats, look_of, plain
from actsparse.report.looks import MUTED, Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import between, listed, percent, times


def data(panel: EvalPanel) -> pl.DataFrame:
    """`plan, speedup, low, high, ceiling, reached, verdict, n` of every timed plan."""
    rows = [
        (
            outcome.label,
            outcome.speedup.value,
            outcome.speedup.low,
            outcome.speedup.high,
            outcome.reach,
            str(outcome.verdict),
            outcome.speedup.n,
        )
        for outcome in panel.compared
        if outcome.speedup.value is not None
    ]
    schema = {
        "plan": pl.String,
        **dict.fromkeys(("speedup", "low", "high", "ceiling"), pl.Float64),
        "verdict": pl.String,
        "n": pl.Int64,
    }
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    gain = (pl.col("speedup") - 1) / (pl.col("ceiling") - 1)
    return frame.with_columns(reached=pl.when(pl.col("ceiling") > 1).then(gain))


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="decode speed-up over dense (×)",
        y="",
        height=120 + 34 * frame.height,
        x_axis={"tickformat": ".2f"},
        y_axis={"autorange": "reversed", "type": "category", "ticks": "", "showline": False},
    )
    names = [plain(plan) for plan in frame["plan"]]
    colours = [look_of(looks, plan).colour for plan in frame["plan"]]
    add_reference(figure, x=1.0)
    figure.add_scatter(
        x=floats(frame["ceiling"]),
        y=names,
        mode="markers",
        name="ceiling (bytes not read)",
        marker={"symbol": "line-ns-open", "size": 18, "color": MUTED, "line": {"width": 2, "color": MUTED}},
        hovertemplate="%{y}: ceiling %{x:.2f}×<extra></extra>",
    )
    for name, colour, row in zip(names, colours, frame.iter_rows(named=True), strict=True):
        figure.add_scatter(
            x=floats([row["speedup"]]),
            y=[name],
            error_x=_interval(row, colour),
            mode="markers+text",
            name=name,
            showlegend=False,
            text=[f"{row['verdict']}"],
            textposition="top center",
            textfont={"size": 11, "color": MUTED},
            marker={"size": 10, "color": colour, "symbol": look_of(looks, row["plan"]).symbol},
            hovertemplate=f"{name}: %{{x:.3f}}× {between(row['low'], row['high'])}<br>{row['verdict']}<extra></extra>",
            cliponaxis=False,
        )
    return figure


def _interval(row: dict[str, float | None], colour: str) -> dict[str, object] | None:
    value, low, high = row["speedup"], row["low"], row["high"]
    if value is None or low is None or high is None:
        return None
    ends = {"array": floats([high - value]), "arrayminus": floats([value - low])}
    return {"type": "data", "symmetric": False, **ends, "thickness": 1.6, "width": 4, "color": colour}


def caption(frame: pl.DataFrame) -> str:
    """How many plans are faster for sure, the fastest, and how much of its ceiling it reaches."""
    faster = frame.filter(pl.col("verdict") == "faster").sort("speedup")
    rest = frame.filter(pl.col("verdict") != "faster")
    are, their = ("is", "its") if faster.height == 1 else ("are", "their")
    text = f"{faster.height} of {frame.height} timed plans {are} faster than dense beyond {their} interval"
    if faster.height:
        row = faster.row(-1, named=True)
        text += f"; {row['plan']} most, {times(row['speedup'])}"
        text += _beside_ceiling(row)
    text += f"; {listed(rest['plan'].to_list())} not" if rest.height and faster.height else ""
    count = frame["n"].drop_nulls().max()
    return f"{text}. n = {count} pairs a plan; bars are bootstrap intervals." if count else f"{text}."


def _beside_ceiling(row: dict[str, Any]) -> str:
    """How much of the possible gain a plan reaches, or that it passes its ceiling."""
    if row["ceiling"] is None:
        return ""
    if row["speedup"] > row["ceiling"]:
        above = f", above its ceiling of {times(row['ceiling'])}"
        if row["low"] is not None and row["low"] > row["ceiling"]:
            return f"{above} for sure: weight bytes are not what bounds decode here"
        return f"{above}, which its interval contains: noise"
    reached = f" ({percent(row['reached'], 0)} of the possible gain)" if row["reached"] is not None else ""
    return f" of at most {times(row['ceiling'])}{reached}"
