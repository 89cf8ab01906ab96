"""Layer x head maps of output norms, by head and by KV group."""

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, colour_bar, floats, layer_axis, shares_scale
from actsparse.report.looks import Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import percent

TOP = 3.0


def heads(panel: ProfilePanel) -> pl.DataFrame:
    return _of(panel, "head")


def groups(panel: ProfilePanel) -> pl.DataFrame:
    """KV groups; empty where each head is a group of its own."""
    grouped = _of(panel, "group")
    return grouped if grouped.height < _of(panel, "head").height else grouped.clear()


def _of(panel: ProfilePanel, unit: str) -> pl.DataFrame:
    """`layer, unit, index, mean_norm, share, relative, gini`: `relative` is the share over an equal share."""
    rows = panel.heads.filter((pl.col("unit") == unit) & pl.col("share").is_not_null())
    gini = panel.measures.filter(
        (pl.col("metric") == "head_gini") & (pl.col("param") == f"unit={unit}") & pl.col("layer").is_not_null()
    ).select("layer", gini="value")
    relative = rows.with_columns(relative=pl.col("share") * pl.len().over("layer"))
    return relative.join(gini, on="layer", how="left", maintain_order="left").sort("layer", "index")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    layers, units = frame["layer"].unique().sort().to_list(), frame["index"].unique().sort().to_list()
    values = {(layer, unit): value for layer, unit, value in frame.select("layer", "index", "relative").iter_rows()}
    name = "head" if frame["unit"][0] == "head" else "KV group"
    figure = canvas(
        x="layer",
        y=name,
        height=min(520, max(240, 120 + 22 * len(units))),
        x_axis={"showgrid": False, **layer_axis(frame)},
        y_axis={"showgrid": False, "dtick": max(1, len(units) // 12)},
    )
    figure.add_heatmap(
        x=layers,
        y=units,
        z=np.stack([floats(values.get((layer, unit)) for layer in layers) for unit in units]),
        zmin=0,
        zmax=TOP,
        xgap=1,
        ygap=1,
        colorscale=shares_scale(),
        colorbar=colour_bar("output norm / equal share", tickvals=[0, 1, 2, 3], ticktext=["0", "1", "2", "3+"]),
        hovertemplate=f"layer %{{x}}, {name} %{{y}}<br>%{{z:.2f}} of an equal share<extra></extra>",
    )
    return figure


def caption(frame: pl.DataFrame) -> str:
    """The unit that stands out most, and the mean inequality."""
    row = frame.sort("relative").row(-1, named=True)
    name = "head" if row["unit"] == "head" else "KV group"
    gini = frame.group_by("layer", maintain_order=True).agg(pl.col("gini").first())["gini"].mean()
    idle = frame.filter(pl.col("relative") < 0.5).height / frame.height
    mean = f"Mean Gini over layers {gini:.2f}; " if isinstance(gini, float) else ""
    strongest = (
        f"{name} {row['index']} of layer {row['layer']} is strongest at {row['relative']:.1f} times an equal share"
    )
    text = f"{mean}{strongest}, and {percent(idle, 0)} of {name}s have less than half of one."
    units = frame.group_by("layer", maintain_order=True).len()["len"].max()
    return f"{text[0].upper()}{text[1:]} n = {units} {name}s a layer."
