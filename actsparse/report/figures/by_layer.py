"""What a plan does layer by layer: the error of the MLP's output, and the neurons really kept."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, integers, layer_axis, look_of, plain, without_crowd
from actsparse.report.figures.columns import counted, param, param_text
from actsparse.report.looks import Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import number, percent


def errors(panel: EvalPanel) -> pl.DataFrame:
    return _of(panel, "rel_err")


def path_errors(panel: EvalPanel) -> pl.DataFrame:
    return _of(panel, "rel_err_path")


def kept(panel: EvalPanel) -> pl.DataFrame:
    return _of(panel, "kept_frac")


def _of(panel: EvalPanel, metric: str) -> pl.DataFrame:
    """`plan, unit, layer, metric, value, stderr, n`; `unit` is what the plan drops there, projections as their mean.

    The standard error of that mean is at most the mean of theirs, whatever binds the projections of a layer together.
    """
    rows = panel.results.filter((pl.col("metric") == metric) & pl.col("value").is_finite())
    heads = param_text("unit") == "kv_group"
    unit = pl.when(param_text("proj").is_not_null()).then(pl.lit("input channels"))
    frame = rows.select(
        "plan", "metric", "value", "stderr", "n", layer=param("layer").cast(pl.Int64),
        unit=unit.when(heads.fill_null(False)).then(pl.lit("KV groups")).otherwise(pl.lit("neurons")),
    ).drop_nulls("layer")  # fmt: skip
    means = pl.col("value").mean(), pl.col("stderr").mean(), pl.col("n").first()
    frame = frame.group_by("plan", "unit", "layer", "metric", maintain_order=True).agg(*means)
    return frame.select("plan", "unit", "layer", "metric", "value", "stderr", "n")


def draw_errors(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _lines(frame, looks, "relative error of the layer's output", {"rangemode": "tozero"}, "%{y:.3f}")


def draw_kept(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _lines(frame, looks, "units kept (share)", {"range": [0, 1.02], "tickformat": ".0%"}, "%{y:.1%} kept")


def _lines(frame: pl.DataFrame, looks: Looks, title: str, axis: dict[str, object], hover: str) -> go.Figure:
    figure = canvas(x="layer", y=title, x_axis=layer_axis(frame), y_axis=axis, height=360)
    lines = [(plan, unit) for plan in without_crowd(frame, looks) for unit in _units(frame, plan)]
    for plan, unit in lines:
        rows = frame.filter((pl.col("plan") == plan) & (pl.col("unit") == unit)).sort("layer")
        look = look_of(looks, plan)
        name = plain(plan if unit == _units(frame, plan)[0] else f"{plan}, {unit}")
        figure.add_scatter(
            x=integers(rows["layer"]),
            y=floats(rows["value"]),
            error_y={
                "type": "data",
                "array": floats(rows["stderr"] * 1.96),
                "thickness": 0.8,
                "width": 0,
                "color": look.colour,
            }
            if rows["stderr"].is_not_null().any()
            else None,
            mode="lines+markers",
            name=name,
            line={"color": look.colour, "width": 1.3 if look.baseline else 2, "dash": look.dash},
            marker={"size": 4 if look.baseline else 5, "color": look.colour, "symbol": look.symbol},
            hovertemplate=f"layer %{{x}}: {hover} ({unit})<extra>{name}</extra>",
        )
    return figure


def _units(frame: pl.DataFrame, plan: str) -> list[str]:
    """What a plan drops, neurons first."""
    found = set(frame.filter(pl.col("plan") == plan)["unit"])
    return [unit for unit in ("neurons", "input channels", "KV groups") if unit in found]


def caption_errors(frame: pl.DataFrame) -> str:
    """The plans with the smallest and largest mean error, and the layer that suffers most."""
    means = frame.group_by("plan", maintain_order=True).agg(pl.col("value").mean()).sort("value")
    (best, low), (worst, high) = means.row(0), means.row(-1)
    layer = frame.group_by("layer", maintain_order=True).agg(pl.col("value").mean()).sort("value").row(-1)
    text = f"Mean error over layers: {number(low, 2)} for {best}" + (
        f", {number(high, 2)} for {worst}" if means.height > 1 else ""
    )
    text += f". Layer {layer[0]} suffers most, {number(layer[1], 2)} on average over plans."
    return text + counted(frame, "positions a layer")


def caption_kept(frame: pl.DataFrame) -> str:
    """Which plans keep the same share everywhere, and how far the others vary."""
    spans = frame.group_by("plan", maintain_order=True).agg(
        low=pl.col("value").min(), high=pl.col("value").max(), mean=pl.col("value").mean()
    )
    varying = spans.filter(pl.col("high") - pl.col("low") > 0.02).sort(pl.col("high") - pl.col("low"), descending=True)
    if varying.is_empty():
        return "Every plan keeps the same share in every layer, within 2 points." + counted(frame, "positions a layer")
    row = varying.row(0, named=True)
    even = spans.height - varying.height
    span = f"{percent(row['low'], 0)} to {percent(row['high'], 0)} by layer, {percent(row['mean'])} on average"
    text = f"{row['plan']} varies most: it keeps {span}"
    text += f"; {even} of {spans.height} plans keep the same share everywhere." if even else "."
    return text + counted(frame, "positions a layer")
