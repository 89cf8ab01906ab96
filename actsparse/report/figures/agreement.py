"""How far the sparse model's next-token distribution moves: KL and equal argmax, plan by plan."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, look_of, plain
from actsparse.report.figures.marks import ends
from actsparse.report.looks import Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import count, number, percent


def kl(panel: EvalPanel) -> pl.DataFrame:
    return _of(panel, "kl")


def top1(panel: EvalPanel) -> pl.DataFrame:
    return _of(panel, "top1")


def _of(panel: EvalPanel, metric: str) -> pl.DataFrame:
    """`plan, metric, value, low, high, n` of every plan but dense."""
    rows = [
        (outcome.label, metric, found.value, found.low, found.high, found.n)
        for outcome in panel.compared
        for found in [outcome.kl if metric == "kl" else outcome.top1]
    ]
    numbers = dict.fromkeys(("value", "low", "high"), pl.Float64)
    schema = {"plan": pl.String, "metric": pl.String, **numbers, "n": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").filter(pl.col("value").is_finite())


def draw_kl(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _dots(
        frame,
        looks,
        title="KL(dense || sparse), nats a token (log)",
        axis={"type": "log", "dtick": 1, "exponentformat": "power"},
        hover="%{x:.3g} nats",
    )


def draw_top1(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _dots(
        frame,
        looks,
        title="same most likely token (share)",
        axis={"range": [0, 1.02], "tickformat": ".0%"},
        hover="%{x:.1%}",
    )


def _dots(frame: pl.DataFrame, looks: Looks, *, title: str, axis: dict[str, object], hover: str) -> go.Figure:
    figure = canvas(
        x=title,
        y="",
        height=96 + 26 * frame.height,
        x_axis=axis,
        y_axis={"autorange": "reversed", "type": "category", "ticks": "", "showline": False},
    )
    for plan, value, low, high in frame.select("plan", "value", "low", "high").iter_rows():
        look = look_of(looks, plan)
        figure.add_scatter(
            x=floats([value]),
            y=[plain(plan)],
            error_x=ends([value], [low], [high], look.colour),
            mode="markers",
            marker={"size": 9, "color": look.colour, "symbol": look.symbol},
            showlegend=False,
            hovertemplate=f"{plain(plan)}: {hover}<extra></extra>",
        )
    return figure


def caption_kl(frame: pl.DataFrame) -> str:
    low, high = frame.sort("value").row(0, named=True), frame.sort("value").row(-1, named=True)
    text = f"{low['plan']} stays closest to dense: {number(low['value'])} nats a token"
    return (
        text
        + (f"; {high['plan']} moves furthest: {number(high['value'])}." if frame.height > 1 else ".")
        + _count(frame)
    )


def caption_top1(frame: pl.DataFrame) -> str:
    high, low = frame.sort("value").row(-1, named=True), frame.sort("value").row(0, named=True)
    text = f"{high['plan']} picks dense's token {percent(high['value'])} of the time"
    return text + (f", {low['plan']} {percent(low['value'])}." if frame.height > 1 else ".") + _count(frame)


def _count(frame: pl.DataFrame) -> str:
    most = frame["n"].max()
    return f" n = {count(most)} scored tokens a plan." if isinstance(most, int) and most else ""
