"""Overlap of two masks against the distance of their tokens, with both chance levels."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas
from actsparse.report.figures.columns import as_float, counted, first_known, measured
from actsparse.report.figures.marks import add_line, log2_axis
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import number, percent, span

LEVELS = {"uniform": ("e_uniform", None), "popular": ("e_pop", "nat")}


def overlaps(panel: ProfilePanel) -> pl.DataFrame:
    """`r, d, value, low, high, n, uniform, popular`: raw overlap of natural text by distance; what chance gives.

    Runs that did not measure chance by distance have that of all pairs of natural text.
    """
    frame = measured(panel.measures, "overlap_distance", numbers=("r", "d")).filter(pl.col("layer").is_null())
    frame = frame.drop("layer").drop_nulls(["r", "d"])
    for name, (metric, pop) in LEVELS.items():
        chance = measured(panel.measures, metric, numbers=("r", "d"), texts=("rung", "pop", "pairs"))
        chance = chance.filter(pl.col("layer").is_null() & pl.col("pop").eq_missing(pl.lit(pop)))
        of_distance = chance.filter(pl.col("pairs") == "distance").select("r", "d", pl.col("value").alias(name))
        natural = pl.col("pairs").is_null() & (pl.col("rung").fill_null("natural") == "natural")
        of_all = chance.filter(natural).select("r", all="value").unique("r", keep="first")
        frame = frame.join(of_distance, on=["r", "d"], how="left", maintain_order="left")
        frame = frame.join(of_all, on="r", how="left", maintain_order="left")
        frame = frame.with_columns(pl.col(name).fill_null(pl.col("all"))).drop("all")
    return frame.sort("r", "d")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="distance of the two tokens (log)",
        y="overlap of their masks (share of the kept neurons)",
        x_axis=log2_axis(),
        y_axis={"rangemode": "tozero", "tickformat": ".2~f"},
    )
    for density, colour in zip(frame["r"].unique().sort(), (DEPTH[0], DEPTH[4], INK), strict=False):
        rows = frame.filter(pl.col("r") == density)
        add_line(
            figure, rows, x="d", y="value", name=f"{density:.0%} of neurons kept", colour=colour,
            hover="%{x} tokens apart: %{y:.3f}",
        )  # fmt: skip
        for column, dash, what in (("uniform", "dot", "uniform chance"), ("popular", "dash", "popularity chance")):
            if first_known(rows[column]) is not None:
                add_line(
                    figure, rows.select("d", column), x="d", y=column, name=f"{density:.0%}: {what}", colour=MUTED,
                    dash=dash, width=1.2, markers=False, hover=f"{what}: %{{y:.3f}}",
                )  # fmt: skip
    add_reference(figure, y=0.0)
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The overlap next to each other and far apart, beside both chance levels."""
    rows = frame.filter(pl.col("r") == frame["r"].min()).sort("d")
    near, far = rows.row(0, named=True), rows.row(-1, named=True)

    at_near, at_far = _levels(near), _levels(far)
    own = at_near != at_far

    def shown(row: dict[str, float], levels: str) -> str:
        beside = "; ".join(part for part in (span(row["low"], row["high"]), levels if own else "") if part)
        return number(row["value"]) + (f" ({beside})" if beside else "")

    text = f"With {percent(as_float(frame['r'].min()), 0)} kept, tokens {near['d']:.0f} apart share "
    text += f"{shown(near, at_near)}, {far['d']:.0f} apart {shown(far, at_far)}"
    text += f"; {at_near}" if at_near and not own else ""
    return f"{text}.{counted(frame, 'sequences')}"


def _levels(row: dict[str, float]) -> str:
    named = (("uniform", "uniform chance"), ("popular", "popularity"))
    return ", ".join(f"{name} {number(row[column], 2)}" for column, name in named if row[column] is not None)
