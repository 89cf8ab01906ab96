"""Mixtures of experts: where the router sends tokens, layer by layer, how sure it is, and how sparse each expert is."""

import math

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, colour_bar, floats, layer_axis, shares_scale
from actsparse.report.figures.columns import as_float, counted, measured
from actsparse.report.figures.marks import add_line
from actsparse.report.looks import DEPTH, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, number, percent

TARGET = 0.2


def loads(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, expert, value, relative, n`: the share of tokens sent to an expert, and over an equal share."""
    frame = measured(panel.measures, "expert_frac", numbers=("expert",)).drop_nulls(["layer", "expert"])
    relative = pl.col("value") / pl.col("value").mean().over("layer")
    return frame.select("layer", pl.col("expert").cast(pl.Int64), "value", relative=relative, n="n").sort(
        "layer", "expert"
    )


def draw_loads(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    return _map(frame, (0.0, as_float(frame["value"].max())), "share of tokens", "%{z:.1%} of the tokens")


def _map(frame: pl.DataFrame, ends: tuple[float, float], title: str, hover: str) -> go.Figure:
    """The `value` of each expert of each layer in colour, on a scale between the ends."""
    layers, experts = (frame[column].unique().sort().to_list() for column in ("layer", "expert"))
    values = {(layer, expert): value for layer, expert, value in frame.select("layer", "expert", "value").iter_rows()}
    figure = canvas(
        x="layer",
        y="expert",
        height=min(560, max(210, 130 + 18 * len(experts))),
        x_axis={"showgrid": False, **layer_axis(frame)},
        y_axis={"showgrid": False, "dtick": max(1, len(experts) // 12)},
    )
    figure.add_heatmap(
        x=layers,
        y=experts,
        z=np.stack([floats(values.get((layer, expert)) for layer in layers) for expert in experts]),
        zmin=ends[0],
        zmax=ends[1],
        xgap=1,
        ygap=1,
        colorscale=shares_scale(),
        colorbar=colour_bar(title, tickformat=".0%"),
        hovertemplate=f"layer %{{x}}, expert %{{y}}<br>{hover}<extra></extra>",
    )
    return figure


def caption_loads(frame: pl.DataFrame) -> str:
    """The busiest expert against an equal share, and how many get less than half of one."""
    row = frame.sort("relative").row(-1, named=True)
    idle = frame.filter(pl.col("relative") < 0.5).height
    return (
        f"Busiest is expert {row['expert']} of layer {row['layer']} with {percent(row['value'])} of the tokens, "
        f"{number(row['relative'], 2)} times an equal share; {idle} of {frame.height} experts get less than half "
        f"of one.{counted(frame, 'tokens')}"
    )


def sparsities(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, expert, target, value, n`: share of an expert's neurons below its own threshold at CETT 0.2, routed
    experts alone; `n`: over how many of its tokens."""
    frame = measured(panel.measures, "expert_cett_sparsity", numbers=("expert", "target"))
    frame = frame.drop_nulls(["layer", "expert"]).filter(pl.col("target") == TARGET)
    return frame.select("layer", pl.col("expert").cast(pl.Int64), "target", "value", "n").sort("layer", "expert")


def draw_sparsities(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """From the least to the most sparse expert in colour, since they lie close together."""
    low, high = as_float(frame["value"].min()), as_float(frame["value"].max())
    ends = (max(0.0, low - 0.02), min(1.0, high + 0.02))
    return _map(frame, ends, "neurons dropped (share)", "%{z:.1%} of its neurons")


def caption_sparsities(frame: pl.DataFrame) -> str:
    """The most and the least sparse expert, and how far the experts of a layer are apart."""
    ordered = frame.sort("value")
    low, high = ordered.row(0, named=True), ordered.row(-1, named=True)
    spread = (
        frame.group_by("layer", maintain_order=True).agg(pl.col("value").max() - pl.col("value").min())["value"].mean()
    )
    fewest, most = (count(int(as_float(end))) for end in (frame["n"].min(), frame["n"].max()))
    return (
        f"At CETT {TARGET:g} expert {low['expert']} of layer {low['layer']} loses {percent(low['value'])} of its "
        f"neurons, expert {high['expert']} of layer {high['layer']} {percent(high['value'])}; those of a layer span "
        f"{percent(as_float(spread))[:-2]} points on average. n = {fewest} to {most} tokens an expert."
    )


def entropies(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, value, even, n`: mean entropy of the router's probabilities in nats; `even` is that of equal ones."""
    experts = loads(panel).group_by("layer", maintain_order=True).agg(even=pl.len().cast(pl.Float64).log())
    frame = measured(panel.measures, "router_entropy").drop_nulls("layer").select("layer", "value", "n").sort("layer")
    return frame.join(experts, on="layer", how="left", maintain_order="left").select("layer", "value", "even", "n")


def draw_entropies(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y="entropy of the router (nats)",
        x_axis=layer_axis(frame),
        y_axis={"rangemode": "tozero", "tickformat": ".1f"},
    )
    add_line(figure, frame, x="layer", y="value", name="router", colour=DEPTH[0], hover="layer %{x}: %{y:.2f} nats")
    even = frame["even"].drop_nulls().max()
    if isinstance(even, float) and math.isfinite(even):
        add_reference(figure, y=even, text="all experts alike", at="start")
    figure.update_layout(showlegend=False)
    return figure


def caption_entropies(frame: pl.DataFrame) -> str:
    """The surest and the least sure layer, beside equal probabilities."""
    low, high = frame.sort("value").row(0, named=True), frame.sort("value").row(-1, named=True)
    text = f"The router is surest in layer {low['layer']}, {number(low['value'], 2)} nats"
    text += f", and least in layer {high['layer']}, {number(high['value'], 2)}" if frame.height > 1 else ""
    even = frame["even"].drop_nulls().max()
    text += f"; equal probabilities would give {number(even, 2)}" if isinstance(even, float) else ""
    return f"{text}.{counted(frame, 'tokens')}"
