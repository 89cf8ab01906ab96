"""Magnitude histograms of a few layers, with the thresholds of plans that gate on that very magnitude."""

import math

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, plain, spread
from actsparse.report.figures.columns import as_float
from actsparse.report.looks import DEPTH, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, number, percent
from actsparse.results import ThresholdPlan

BINS_A_DECADE = 12
GATED_KINDS = {"cats": "gate", "countdown": "up"}


def gates(panel: ProfilePanel) -> pl.DataFrame:
    return _histogram(panel, "gate")


def neurons(panel: ProfilePanel) -> pl.DataFrame:
    return _histogram(panel, "neuron")


def _histogram(panel: ProfilePanel, kind: str) -> pl.DataFrame:
    """`layer, kind, magnitude, density, n, plan, threshold, below`: share of values by magnitude, at most five layers.

    `threshold` is the one of `plan` in that layer and `below` the share of values under it, null where no plan gates
    on this kind.
    """
    names = [name.split(".") for name in panel.histograms if name.endswith(".counts")]
    layers = spread([int(part[1]) for part in names if len(part) == 4 and part[2] == kind and part[1].isdigit()])
    plan = next((plan for plan in panel.plans if GATED_KINDS.get(plan.method) == kind), None)
    rows = [row for layer in layers for row in _rows(panel, layer, kind, plan)]
    schema = {"layer": pl.Int64, "kind": pl.String, "magnitude": pl.Float64, "density": pl.Float64, "n": pl.Int64}
    more = {"plan": pl.String, "threshold": pl.Float64, "below": pl.Float64}
    return pl.DataFrame(rows, schema=schema | more, orient="row")


def _rows(panel: ProfilePanel, layer: int, kind: str, plan: ThresholdPlan | None) -> list[tuple[object, ...]]:
    counts = np.asarray(panel.histograms[f"layers.{layer}.{kind}.counts"], dtype=np.float64)
    edges = np.asarray(panel.histograms.get(f"layers.{layer}.{kind}.edges", ()), dtype=np.float64)
    total = counts.sum()
    if len(edges) != len(counts) + 1 or not total > 0:
        return []
    threshold = next((part.threshold for part in plan.layers if part.layer == layer), None) if plan else None
    below = float(counts[edges[1:] <= threshold].sum() / total) if threshold is not None else None
    short = plan.short if plan and threshold is not None else None
    return [
        (layer, kind, magnitude, density, int(total), short, threshold, below)
        for magnitude, density in _by_decade(counts / total, edges)
    ]


def _by_decade(shares: np.ndarray, edges: np.ndarray) -> list[tuple[float, float]]:
    """The share of values in bins of 1/12 decade, between the first and last 0.01 % of the values."""
    positive = edges[:-1] > 0
    middles, weights = np.sqrt(edges[:-1][positive] * edges[1:][positive]), shares[positive]
    if not weights.sum() > 0:
        return []
    steps = np.floor(np.log10(middles) * BINS_A_DECADE).astype(int)
    total = np.bincount(steps - steps.min(), weights)
    reached = np.cumsum(total) / total.sum()
    first, last = int(np.searchsorted(reached, 1e-4)), int(np.searchsorted(reached, 1 - 1e-5))
    return [
        (10 ** ((steps.min() + place + 0.5) / BINS_A_DECADE), float(total[place]))
        for place in range(first, min(last, len(total) - 1) + 1)
    ]


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    kind = frame["kind"][0]
    figure = canvas(
        x=f"|{kind}| (activation units, log)",
        y=f"share of values per 1/{BINS_A_DECADE} decade",
        x_axis={"type": "log", "exponentformat": "power", "dtick": 1},
        y_axis={"rangemode": "tozero", "tickformat": ".2~p"},
    )
    layers = frame["layer"].unique().sort().to_list()
    for place, layer in enumerate(layers):
        rows = frame.filter(pl.col("layer") == layer)
        colour = DEPTH[round(place * 4 / max(1, len(layers) - 1))]
        figure.add_scatter(
            x=floats(rows["magnitude"]),
            y=floats(rows["density"]),
            mode="lines",
            name=f"layer {layer}",
            line={"color": colour, "width": 1.8, "shape": "hvh"},
            hovertemplate=f"%{{x:.2e}}: %{{y:.2%}} of the values<extra>layer {layer}</extra>",
        )
        threshold = rows["threshold"][0]
        if threshold:
            figure.add_scatter(
                x=[threshold, threshold],
                y=[0, frame["density"].max()],
                mode="lines",
                line={"color": colour, "width": 1.2, "dash": "dash"},
                showlegend=False,
                hovertemplate=f"{plain(rows['plan'][0])}: threshold {number(threshold)}<extra>layer {layer}</extra>",
            )
    return figure


def caption(frame: pl.DataFrame) -> str:
    """Where the bulk of the values lies, and what the thresholds cut off."""
    modes = frame.sort("density", descending=True).group_by("layer", maintain_order=True).first().sort("layer")
    low, high = modes["magnitude"].min(), modes["magnitude"].max()
    widest = _width(frame)
    ends = [number(as_float(end), 2) for end in (low, high)]
    where = f"at {ends[0]} in every layer shown" if ends[0] == ends[1] else f"between {ends[0]} and {ends[1]} by layer"
    text = f"Values crowd {where}, over {widest:.1f} decades"
    cut = modes.drop_nulls("below")
    if cut.height:
        text += (
            f"; {cut['plan'][0]} (dashed) cuts off {percent(as_float(cut['below'].min()), 0)} to "
            f"{percent(as_float(cut['below'].max()), 0)} of them in the layers shown"
        )
    return f"{text}. n = {count(int(as_float(frame['n'].max())))} values a layer at most."


def _width(frame: pl.DataFrame) -> float:
    """Decades between the smallest and largest magnitude with more than 0.1 % of the values in their bin."""
    dense = frame.filter(pl.col("density") > 0.001)["magnitude"]
    low, high = as_float(dense.min()), as_float(dense.max())
    return math.log10(high / low) if low > 0 and high > low else 0.0
