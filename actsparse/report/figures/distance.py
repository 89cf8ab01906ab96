"""Overlap of two masks against the distance of their tokens, with both chance levels."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas
from actsparse.report.figures.columns import as_float, counted, first_known, measured
from actsparse.report.figures.marks import add_line, log2_axis
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import number, percent, span


def overlaps(panel: ProfilePanel) -> pl.DataFrame:
    """`r, d, value, low, high, n, uniform, popular`: raw overlap of natural text by distance; what chance gives."""
    frame = measured(panel.measures, "overlap_distance", numbers=("r", "d")).filter(pl.col("layer").is_null())
    chance = {
        name: measured(panel.measures, metric, numbers=("r",), texts=("rung", "pop"))
        .filter(pl.col("layer").is_null() & (pl.col("rung").fill_null("natural") == "natural") & wanted)
        .select("r", pl.col("value").alias(name))
        .unique("r", keep="first")
        for name, metric, wanted in (
            ("uniform", "e_uniform", pl.lit(True)),
            ("popular", "e_pop", pl.col("pop") == "nat"),
        )
    }
    frame = frame.drop("layer").drop_nulls(["r", "d"])
    for part in chance.values():
        frame = frame.join(part, on="r", how="left", maintain_order="left")
    return frame.sort("r", "d")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="distance of the two tokens (log)",
        y="overlap of their masks (share of the kept neurons)",
        x_axis=log2_axis(),
        y_axis={"range": [0, 1.02], "tickformat": ".1f"},
    )
    for density, colour in zip(frame["r"].unique().sort(), (DEPTH[0], DEPTH[4], INK), strict=False):
        rows = frame.filter(pl.col("r") == density)
        add_line(
            figure, rows, x="d", y="value", name=f"{density:.0%} of neurons kept", colour=colour,
            hover="%{x} tokens apart: %{y:.3f}",
        )  # fmt: skip
        for column, dash, what in (("uniform", "dot", "uniform chance"), ("popular", "dash", "popularity chance")):
            level = first_known(rows[column])
            if level is not None:
                flat = rows.select("d", value=pl.lit(level))
                add_line(
                    figure, flat, x="d", y="value", name=f"{density:.0%}: {what}", colour=MUTED, dash=dash, width=1.2,
                    markers=False, hover=f"{what}: %{{y:.3f}}",
                )  # fmt: skip
    add_reference(figure, y=0.0)
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The overlap next to each other and far apart, beside both chance levels."""
    rows = frame.filter(pl.col("r") == frame["r"].min()).sort("d")
    near, far = rows.row(0, named=True), rows.row(-1, named=True)

    def shown(row: dict[str, float]) -> str:
        interval = span(row["low"], row["high"])
        return number(row["value"]) + (f" ({interval})" if interval else "")

    text = f"With {percent(as_float(frame['r'].min()), 0)} kept, tokens {near['d']:.0f} apart share {shown(near)}"
    text += f", {far['d']:.0f} apart {shown(far)}"
    levels = [
        f"{name} {number(near[column], 2)}"
        for column, name in (("uniform", "uniform chance"), ("popular", "popularity"))
        if near[column] is not None
    ]
    return f"{text}{'; ' if levels else ''}{', '.join(levels)}.{counted(frame, 'sequences')}"
