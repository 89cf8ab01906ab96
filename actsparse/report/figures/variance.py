"""SI3: what the size of an activation depends on, as shares of its variance, layer by layer."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, integers, layer_axis
from actsparse.report.figures.columns import as_float, counted, measured
from actsparse.report.looks import DEPTH, RANDOM_GREY, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import between, listed, percent

FACTORS = {
    "neuron": ("neuron (static hot set)", DEPTH[0]),
    "sequence": ("sequence (inertia)", DEPTH[4]),
    "token_type": ("token", DEPTH[1]),
    "position": ("position", DEPTH[3]),
    "residual": ("the rest (context)", RANDOM_GREY),
}


def shares(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, factor, value, low, high, chance, n`: the share of a factor, and what one without effect would take.

    The row of a factor with a null `layer` is its mean over layers.
    """
    frame = measured(panel.measures, "si3", texts=("factor",))
    chance = measured(panel.measures, "si3_chance", texts=("factor",)).select("layer", "factor", chance="value")
    joined = frame.join(chance, on=["layer", "factor"], how="left", maintain_order="left")
    found = joined.filter(pl.col("factor").is_in(list(FACTORS)))
    return found.select("layer", "factor", "value", "low", "high", "chance", "n")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y="share of the variance of log |a| / ‖a‖",
        x_axis={"showgrid": False, **layer_axis(frame.drop_nulls("layer"))},
        y_axis={"range": [0, 1], "tickformat": ".0%"},
    )
    for factor, (name, colour) in FACTORS.items():
        rows = frame.filter((pl.col("factor") == factor) & pl.col("layer").is_not_null()).sort("layer")
        if rows.height:
            figure.add_bar(
                x=integers(rows["layer"]),
                y=floats(rows["value"]),
                name=name,
                marker={"color": colour},
                hovertemplate=f"layer %{{x}}: %{{y:.1%}}<extra>{name}</extra>",
            )
    figure.update_layout(barmode="stack", bargap=0.15, legend={"traceorder": "normal"})
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The mean shares over layers, and whether the sequence takes more than one without effect would."""
    means = {factor: rows for factor, rows in _means(frame).items() if factor != "residual"}
    ordered = sorted(means.items(), key=lambda item: -item[1][0])
    said = listed([f"{FACTORS[factor][0].split(' (')[0]} {percent(value, 1)}{_interval(frame, factor)}"
                   for factor, (value, _) in ordered])  # fmt: skip
    text = f"Mean shares over layers: {said}"
    if "sequence" in means:
        value, chance = means["sequence"]
        if chance is not None:
            more = value / chance if chance > 0 else None
            beyond = (
                "no more than" if value <= 1.05 * chance else f"{more:.1f} times" if more is not None else "more than"
            )
            text += f". The sequence takes {beyond} what a factor without effect would ({percent(chance, 1)})"
    return f"{text}.{counted(frame, 'texts')}"


def _interval(frame: pl.DataFrame, factor: str) -> str:
    """The interval of a factor's mean over layers, in per cent."""
    rows = frame.filter((pl.col("factor") == factor) & pl.col("layer").is_null())
    text = "" if rows.is_empty() else between(*(100 * as_float(rows[end][0]) for end in ("low", "high")), decimals=1)
    return f" ({text})" if text else ""


def _means(frame: pl.DataFrame) -> dict[str, tuple[float, float | None]]:
    means = (
        frame.drop_nulls("layer")
        .group_by("factor", maintain_order=True)
        .agg(pl.col("value").mean(), pl.col("chance").mean())
    )
    return {factor: (as_float(value), chance) for factor, value, chance in means.iter_rows()}
