"""Activity against token position: sparsity at a CETT level, the rms and the exact zeros of neurons."""

import math

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, spread
from actsparse.report.figures.columns import counted, param
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import percent


def rms(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, from, to, value, n`: rms at a range of positions over the layer's mean."""
    frame = _of(panel, "position_rms")
    return frame.with_columns(value=pl.col("value") / pl.col("value").mean().over("layer"))


def sparsity(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, from, to, value, n`: share of neurons under the threshold of CETT 0.2 at a range of positions."""
    return _of(panel, "position_sparsity")


def zeros(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, from, to, value, n`: share of exact zeros; empty where there are practically none."""
    frame = _of(panel, "position_zero_frac")
    largest = frame["value"].max()
    return frame if isinstance(largest, float) and largest >= 0.001 else frame.clear()


def _of(panel: ProfilePanel, metric: str) -> pl.DataFrame:
    rows = panel.measures.filter(
        (pl.col("metric") == metric) & pl.col("layer").is_not_null() & pl.col("value").is_not_null()
    )
    frame = rows.select("layer", param("from").alias("from"), param("to").alias("to"), "value", "n")
    return frame.drop_nulls(["from", "to"]).sort("layer", "from")


def draw_rms(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _lines(frame, "rms / the layer's mean", "%{y:.2f} of the layer's mean", ".2f")


def draw_sparsity(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _lines(frame, "sparsity at CETT 0.2", "%{y:.1%} sparse", ".0%")


def draw_zeros(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _lines(frame, "exact zeros (share)", "%{y:.1%} zeros", ".0%")


def _lines(frame: pl.DataFrame, title: str, hover: str, ticks: str) -> go.Figure:
    figure = canvas(
        x="token position (log)",
        y=title,
        x_axis={"type": "log", "dtick": 0.30103, "tickformat": "d"},
        y_axis={"tickformat": ticks},
    )
    shown = spread(frame["layer"].to_list())
    mean = frame.group_by("from", "to", maintain_order=True).agg(pl.col("value").mean()).sort("from")
    parts = [
        (f"layer {layer}", frame.filter(pl.col("layer") == layer), layer) for layer in frame["layer"].unique().sort()
    ]
    for name, rows, layer in parts:
        marked = layer in shown
        colour = DEPTH[round(shown.index(layer) * 4 / max(1, len(shown) - 1))] if marked else MUTED
        _line(figure, rows, name=name, colour=colour, width=1.6 if marked else 1, hover=hover, shown=marked)
    if len(parts) > 1:
        _line(figure, mean, name="mean", colour=INK, width=2.6, hover=hover, shown=True)
    return figure


def _line(
    figure: go.Figure, rows: pl.DataFrame, *, name: str, colour: str, width: float, hover: str, shown: bool
) -> None:
    places = [math.sqrt(max(1.0, low) * max(1.0, high - 1)) for low, high in rows.select("from", "to").iter_rows()]
    ranges = [f"{low:.0f}\u2013{high - 1:.0f}" for low, high in rows.select("from", "to").iter_rows()]
    figure.add_scatter(
        x=floats(places),
        y=floats(rows["value"]),
        customdata=ranges,
        mode="lines",
        name=name,
        showlegend=shown,
        opacity=1 if shown else 0.28,
        line={"color": colour, "width": width},
        hovertemplate=f"positions %{{customdata}}: {hover}<extra>{name}</extra>",
    )


def caption_rms(frame: pl.DataFrame) -> str:
    first, last = _ends(frame)
    change = last / first - 1 if first else 0.0
    trend = "changes little" if abs(change) < 0.1 else ("rises" if change > 0 else "falls")
    moved = f"{percent(change, 0, signed=True)} from the first to the last range of positions"
    return f"Over the prompt the mean activation size {trend}: {moved}.{counted(frame, 'activations')}"


def caption_sparsity(frame: pl.DataFrame) -> str:
    first, last = _ends(frame)
    tokens = int(frame.group_by("layer", maintain_order=True).agg(pl.col("n").sum())["n"].max() or 0)  # pyright: ignore[reportArgumentType]
    moved = "hardly moves" if abs(last - first) < 0.02 else ("rises" if last > first else "falls")
    return (
        f"With one threshold for all positions, sparsity {moved} along the text: {percent(first)} at the first"
        f" positions, {percent(last)} at the last, mean over layers. n = {tokens} sampled tokens."
    )


def caption_zeros(frame: pl.DataFrame) -> str:
    first, last = _ends(frame)
    return (
        f"Exact zeros go from {percent(first)} at the first positions to {percent(last)} at the last, mean over layers."
        f"{counted(frame, 'activations')}"
    )


def _ends(frame: pl.DataFrame) -> tuple[float, float]:
    mean = frame.group_by("from", maintain_order=True).agg(pl.col("value").mean()).sort("from")["value"]
    return float(mean[0]), float(mean[-1])
