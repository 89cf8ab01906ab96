"""Damage along the text: KL against position in the block."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, look_of, plain, without_crowd
from actsparse.report.figures.columns import counted
from actsparse.report.looks import Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.wording import number

BIN = 16


def data(panel: EvalPanel) -> pl.DataFrame:
    """`plan, from, kl, stderr, n`: mean KL over blocks in bins of 16 positions."""
    scored = panel.tokens.filter(pl.col("kl").is_finite() & (pl.col("plan") != Role.DENSE))
    bins = scored.group_by("plan", (pl.col("position") // BIN * BIN).alias("from"), maintain_order=True)
    stderr = pl.col("kl").std() / pl.len().sqrt()
    return bins.agg(pl.col("kl").mean(), stderr=stderr, n=pl.len().cast(pl.Int64)).sort("plan", "from")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="position in the block (tokens)",
        y="KL(dense || sparse), nats a token (log)",
        y_axis={"type": "log", "dtick": 1, "exponentformat": "power"},
        height=360,
    )
    for plan in without_crowd(frame, looks):
        rows, look = frame.filter(pl.col("plan") == plan), look_of(looks, plan)
        figure.add_scatter(
            x=floats(rows["from"] + BIN / 2),
            y=floats(rows["kl"]),
            mode="lines",
            name=plain(plan),
            line={"color": look.colour, "width": 1.3 if look.baseline else 2, "dash": look.dash},
            hovertemplate=f"around %{{x:.0f}}: %{{y:.3g}} nats<extra>{plain(plan)}</extra>",
        )
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The plan whose KL grows most from the first to the last quarter of the scored positions."""
    low, high = float(str(frame["from"].min())), float(str(frame["from"].max()))
    quarter = (high - low) / 4
    first = (
        frame.filter(pl.col("from") <= low + quarter)
        .group_by("plan", maintain_order=True)
        .agg(first=pl.col("kl").mean())
    )
    last = (
        frame.filter(pl.col("from") >= high - quarter)
        .group_by("plan", maintain_order=True)
        .agg(last=pl.col("kl").mean())
    )
    growth = (
        first.join(last, on="plan", maintain_order="left")
        .with_columns(ratio=pl.col("last") / pl.col("first"))
        .filter(pl.col("ratio").is_finite())
        .sort("ratio")
    )
    if growth.is_empty():
        return "Too few positions to see a trend."
    row = growth.row(-1, named=True)
    trend = "grows most along the text" if row["ratio"] > 1.1 else "grows little along the text, like every plan"
    ends = f"{number(row['first'])} in the first quarter of the positions, {number(row['last'])} in the last"
    return f"KL of {row['plan']} {trend}: {ends}.{counted(frame, f'tokens in a bin of {BIN} positions')}"
