"""Weight bytes read per decoded token, by component, dense and sparse."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, plain
from actsparse.report.looks import DEPTH, ORACLE_BROWN, STATIC_GREYS, Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import percent, size

COLOURS = (DEPTH[0], DEPTH[4], STATIC_GREYS[2], ORACLE_BROWN, DEPTH[1], DEPTH[3])
MEGA = 1e6


def data(panel: EvalPanel) -> pl.DataFrame:
    """`plan, component, bytes`, from the metrics `bytes_<component>`."""
    rows = panel.results.filter(
        pl.col("metric").str.starts_with("bytes_") & pl.col("value").is_finite() & (pl.col("unit") == "bytes")
    )
    return rows.select("plan", component=pl.col("metric").str.strip_prefix("bytes_"), bytes="value")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    plans = list(dict.fromkeys(frame["plan"]))
    figure = canvas(
        x="weight bytes read a token (MB)",
        y="",
        height=120 + 28 * len(plans),
        x_axis={"rangemode": "tozero"},
        y_axis={"autorange": "reversed", "type": "category", "ticks": "", "showline": False},
    )
    for place, component in enumerate(dict.fromkeys(frame["component"])):
        values = dict(frame.filter(pl.col("component") == component).select("plan", "bytes").iter_rows())
        figure.add_bar(
            x=floats(values.get(plan, 0.0) / MEGA for plan in plans),
            y=[plain(plan) for plan in plans],
            orientation="h",
            name=plain(component),
            marker={"color": COLOURS[place % len(COLOURS)], "line": {"width": 0}},
            hovertemplate=f"%{{y}}<br>{plain(component)}: %{{x:.1f}} MB<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    return figure


def caption(frame: pl.DataFrame) -> str:
    """Dense bytes a token, its largest component, and the plan that reads least."""
    totals = frame.group_by("plan", maintain_order=True).agg(pl.col("bytes").sum()).sort("bytes")
    least, low = totals.row(0)
    dense = frame.filter(pl.col("plan") == "dense").sort("bytes")
    if dense.is_empty():
        return f"{least} reads least: {size(low)} a token. n = {totals.height} plans."
    total = float(dense["bytes"].sum())
    largest = dense.row(-1, named=True)
    text = f"Dense reads {size(total)} a token, {percent(largest['bytes'] / total, 0)} of it {largest['component']}"
    low_share = percent(low / total - 1, 0, signed=True)
    return f"{text}; {least} reads least, {size(low)} ({low_share}). n = {totals.height} plans, counted, not measured."
