"""What the loss says of activations: HU4, how far past salience tells the present one, and M2, the root cause."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, layer_axis, spread
from actsparse.report.figures.columns import as_float, counted, measured
from actsparse.report.figures.marks import add_line
from actsparse.report.looks import DEPTH, INK, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import number, span

WIDTH = 0.2


def salience(panel: ProfilePanel) -> pl.DataFrame:
    """`layer` (null: mean), `bin, value, low, high, n`: HU4 by the diversity of the history."""
    frame = measured(panel.measures, "hu4", numbers=("bin",)).drop_nulls("bin")
    return frame.select("layer", "bin", "value", "low", "high", "n").sort("layer", "bin")


def draw_salience(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="distinct over total tokens so far (bins of 0.2)",
        y="HU4 (0: the past says all, 1: nothing)",
        x_axis={"range": [0, 1], "dtick": WIDTH},
        y_axis={"tickformat": ".1f", "rangemode": "tozero"},
    )
    middles = frame.with_columns(place=pl.col("bin") + WIDTH / 2)
    layers = spread(frame["layer"].drop_nulls().to_list())
    for place, layer in enumerate(layers):
        rows = middles.filter(pl.col("layer") == layer).drop("low", "high")
        colour = DEPTH[round(place * 4 / max(1, len(layers) - 1))]
        add_line(
            figure, rows, x="place", y="value", name=f"layer {layer}", colour=colour, width=1.2, markers=False,
            hover="around %{x:.1f}: %{y:.2f}",
        )  # fmt: skip
    mean = middles.filter(pl.col("layer").is_null())
    if mean.height:
        add_line(
            figure, mean, x="place", y="value", name="mean", colour=INK, width=2.6, hover="around %{x:.1f}: %{y:.2f}"
        )
    add_reference(figure, y=1.0, text="nothing", at="start")
    return figure


def caption_salience(frame: pl.DataFrame) -> str:
    """Whether uncertainty rises with the diversity of the history, as MOYU says, by the intervals of the ends."""
    mean = frame.filter(pl.col("layer").is_null()).sort("bin")
    over_layers = frame.group_by("bin", maintain_order=True).agg(pl.col("value", "low", "high").mean()).sort("bin")
    rows = mean if mean.height else over_layers
    first, last = rows.row(0, named=True), rows.row(-1, named=True)
    if rows.height < 2:
        return f"Only one bin of diversity was reached: HU4 = {number(first['value'], 2)}.{counted(frame, 'texts')}"
    known = None not in (first["low"], first["high"], last["low"], last["high"])
    trend = "does not clearly change"
    if known and last["low"] > first["high"]:
        trend = "rises"
    elif known and last["high"] < first["low"]:
        trend = "falls"
    return (
        f"HU4 {trend} with the diversity of the history: {_shown(first)} from {number(first['bin'], 2)} on, "
        f"{_shown(last)} from {number(last['bin'], 2)} on.{counted(frame, 'texts')}"
    )


def _shown(row: dict[str, float | None]) -> str:
    interval = span(row["low"], row["high"])
    return number(row["value"], 2) + (f" ({interval})" if interval else "")


def signs(panel: ProfilePanel) -> pl.DataFrame:
    """`entries, layer, value, low, high, n`: M2 over the most active entries, and over all that are not 0."""
    frame = measured(panel.measures, "m2", numbers=("r",), texts=("exact",)).drop_nulls("layer")
    named = pl.when(pl.col("exact").is_not_null()).then(pl.lit("all that are not 0")).otherwise(pl.lit("most active"))
    return frame.select("layer", "value", "low", "high", "n", entries=named).sort("entries", "layer")


def draw_signs(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(x="layer", y="mean of sign(a) · dL/da (nats a unit)", x_axis=layer_axis(frame), y_axis={})
    for entries, colour, dash in (("most active", DEPTH[0], "solid"), ("all that are not 0", DEPTH[4], "dash")):
        rows = frame.filter(pl.col("entries") == entries)
        if rows.height:
            add_line(
                figure, rows, x="layer", y="value", name=entries, colour=colour, dash=dash,
                hover="layer %{x}: %{y:.3~g}",
            )  # fmt: skip
    add_reference(figure, y=0.0)
    return figure


def caption_signs(frame: pl.DataFrame) -> str:
    """In how many layers the sign is sure, and which way."""
    kind = "most active" if "most active" in set(frame["entries"]) else str(frame["entries"][0])
    rows = frame.filter(pl.col("entries") == kind)
    above, below = rows.filter(pl.col("low") > 0).height, rows.filter(pl.col("high") < 0).height
    text = f"For the entries {kind} the mean is above 0 for sure in {above} of {rows.height} layers, below in {below}"
    if above > rows.height / 2:
        text += ": the loss would fall were they smaller, over-activation as MOYU says"
    elif below > rows.height / 2:
        text += ": the loss would fall were they larger, against MOYU's root cause"
    else:
        text += ": no common sign"
    return f"{text}. Mean over layers {number(as_float(rows['value'].mean()), 2)}.{counted(frame, 'texts')}"
