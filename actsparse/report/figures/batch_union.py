"""Batch union: how many neurons a batch of B tokens needs together."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas
from actsparse.report.figures.columns import as_float, counted, measured
from actsparse.report.figures.marks import add_line, log2_axis
from actsparse.report.looks import DEPTH, INK, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import between, percent

CURVES = {
    "union": ("measured", "solid"),
    "union_independent": ("independent, same popularity", "dash"),
    "union_uniform": ("equally popular neurons", "dot"),
}
PAYS = 0.97


def curves(panel: ProfilePanel) -> pl.DataFrame:
    """`metric, r, b, value, low, high, n`: the share of neurons that any of B tokens uses, mean of layers."""
    parts = [
        measured(panel.measures, metric, numbers=("r", "b")).with_columns(metric=pl.lit(metric)) for metric in CURVES
    ]
    frame = pl.concat(parts).filter(pl.col("layer").is_null()).drop_nulls(["r", "b"])
    found = frame.select("metric", "r", "b", "value", "low", "high", "n").sort("r", "metric", "b")
    return found if "union" in set(found["metric"]) else found.clear()


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="tokens in the batch, B (log)",
        y="neurons that any of them uses (share)",
        x_axis=log2_axis(),
        y_axis={"range": [0, 1.02], "tickformat": ".0%"},
    )
    for density, colour in zip(frame["r"].unique().sort(), (DEPTH[0], DEPTH[4], INK), strict=False):
        for metric, (name, dash) in CURVES.items():
            rows = frame.filter((pl.col("metric") == metric) & (pl.col("r") == density))
            if rows.height:
                # bars where they can be told apart
                apart = pl.col("b").is_in([2.0**power for power in range(7)])
                rows = rows.with_columns(pl.when(apart).then(pl.col(end)).alias(end) for end in ("low", "high"))
                add_line(
                    figure, rows, x="b", y="value", name=f"{density:.0%} kept: {name}", colour=colour, dash=dash,
                    width=2.2 if metric == "union" else 1.3, markers=False, hover="B = %{x}: %{y:.1%}",
                )  # fmt: skip
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The union at batches of 2, 4 and 8, beside independent tokens, and where nothing is left to skip."""
    rows = frame.filter((pl.col("metric") == "union") & (pl.col("r") == frame["r"].min())).sort("b")
    at = {int(row["b"]): row["value"] for row in rows.iter_rows(named=True)}
    points = ", ".join(f"{_share(row)} at B = {int(row['b'])}" for row in rows.iter_rows(named=True)
                       if row["b"] in (1, 2, 4, 8, 16))  # fmt: skip
    text = f"Of neurons kept at {percent(as_float(frame['r'].min()), 0)}, a batch uses {points}"
    full = rows.filter(pl.col("value") >= PAYS)["b"].min()
    last = int(as_float(rows["b"].max()))
    text += (
        f"; from B = {int(as_float(full))} on nearly all"
        if full is not None
        else f"; {percent(at[last], 0)} at B = {last}"
    )
    same = frame.filter(
        (pl.col("metric") == "union_independent") & (pl.col("r") == frame["r"].min()) & (pl.col("b") == 8)
    )
    if same.height and 8 in at:
        text += (
            f". Tokens of different texts {_beside_independent(at[8] - as_float(same['value'][0]))} independent ones"
        )
    return f"{text}.{counted(rows, 'texts')}"


def _share(row: dict[str, Any]) -> str:
    """A share with its interval, in per cent."""
    interval = between(*(100 * as_float(row[end]) for end in ("low", "high")), decimals=1)
    return percent(row["value"]) + (f" ({interval})" if interval else "")


def _beside_independent(gap: float) -> str:
    if abs(gap) < 0.02:
        return "overlap no more than"
    return "share more neurons than" if gap < 0 else "share fewer neurons than"
