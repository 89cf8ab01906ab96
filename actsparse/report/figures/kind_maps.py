"""Layer x kind heat maps: exact zeros, and how far the median lies below the root mean square."""

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, colour_bar, floats, layer_axis, shares_scale
from actsparse.report.looks import Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, number, percent
from actsparse.results import SiteKind

GAUSSIAN_MEDIAN = 0.674
NO_ZEROS = 0.02
_ORDER = [kind.value for kind in SiteKind]


def zeros(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, kind, value, n`: the share of exact zeros; empty where there are practically none."""
    found = _of(panel.measures, "zero_frac", "")
    largest = found["value"].max()
    return found if isinstance(largest, float) and largest >= NO_ZEROS else found.clear()


def medians(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, kind, value, n, zeros`: the median of |x| over its rms, and the largest share of exact zeros."""
    median = _of(panel.measures, "abs_quantile", "s=0.5")
    rms = _of(panel.measures, "rms", "").select("layer", "kind", rms="value")
    joined = median.join(rms, on=["layer", "kind"], maintain_order="left").filter(pl.col("rms") > 0)
    largest = _of(panel.measures, "zero_frac", "")["value"].max()
    return joined.with_columns(value=pl.col("value") / pl.col("rms"), zeros=pl.lit(largest, pl.Float64)).drop("rms")


def _of(measures: pl.DataFrame, metric: str, param: str) -> pl.DataFrame:
    rows = measures.filter(
        (pl.col("metric") == metric)
        & (pl.col("param") == param)
        & pl.col("layer").is_not_null()
        & pl.col("value").is_not_null()
    )
    return rows.select("layer", "kind", "value", "n").sort("layer")


def draw_zeros(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _map(
        frame, title="exact zeros (share)", top=1.0, template="%{z:.1%} exact zeros", tickformat=".0%", flip=False
    )


def draw_medians(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _map(
        frame, title="median |x| / rms", top=0.7, template="median %{z:.3f} of the rms", tickformat=".1f", flip=True
    )


def _map(frame: pl.DataFrame, *, title: str, top: float, template: str, tickformat: str, flip: bool) -> go.Figure:
    present = set(frame["kind"].unique())
    kinds = [kind for kind in _ORDER if kind in present] + sorted(present - set(_ORDER))
    layers = frame["layer"].unique().sort().to_list()
    values = {(layer, kind): value for layer, kind, value in frame.select("layer", "kind", "value").iter_rows()}
    scale = shares_scale()
    figure = canvas(
        x="layer",
        y="",
        height=96 + 34 * len(kinds),
        x_axis={"showgrid": False, **layer_axis(frame)},
        y_axis={"showgrid": False, "autorange": "reversed", "type": "category", "ticks": ""},
    )
    grid = [floats(values.get((layer, kind)) for layer in layers) for kind in kinds]
    figure.add_heatmap(
        x=layers,
        y=kinds,
        z=np.stack(grid),
        zmin=0,
        zmax=top,
        xgap=1,
        ygap=1,
        colorscale=[[1 - place, colour] for place, colour in reversed(scale)] if flip else scale,
        colorbar=colour_bar(title, tickformat=tickformat),
        hovertemplate=f"layer %{{x}}, %{{y}}<br>{template}<extra></extra>",
    )
    return figure


def caption_zeros(frame: pl.DataFrame) -> str:
    """Which kind holds most zeros, and in which layer."""
    means = frame.group_by("kind").agg(pl.col("value").mean()).sort("value", descending=True)
    kind, mean = means.row(0)
    rows = frame.filter(pl.col("kind") == kind).sort("value")
    low, high = rows.row(0, named=True), rows.row(-1, named=True)
    return (
        f"Most exact zeros are in {kind}: {percent(mean)} on average, "
        f"from {percent(low['value'])} in layer {low['layer']} to "
        f"{percent(high['value'])} in layer {high['layer']}{_tokens(frame)}."
    )


def caption_medians(frame: pl.DataFrame) -> str:
    """The kind whose median lies lowest below its rms, and whether there are exact zeros."""
    means = frame.group_by("kind").agg(pl.col("value").mean()).sort("value")
    kind, value = means.row(0)
    largest = frame["zeros"][0]
    zero = _zeros_said(largest)
    return (
        f"Most concentrated is {kind}: half of its values lie below {number(value, 2)} of the rms on average "
        f"over layers (a Gaussian: {GAUSSIAN_MEDIAN}){_tokens(frame)}.{zero}"
    )


def _zeros_said(largest: float | None) -> str:
    if largest is None or largest >= NO_ZEROS:
        return ""
    return f" Exact zeros are rare: {percent(largest, 2)} at most." if largest >= 5e-5 else " There are no exact zeros."


def _tokens(frame: pl.DataFrame) -> str:
    most = frame["n"].max()
    return f"; n = {count(most)} values a cell at most" if isinstance(most, int) and most else ""
