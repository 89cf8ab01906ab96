"""Which of the hottest neurons fire together: correlations inside the hot set of a layer."""

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, colour_bar, floats, set_variants, spread
from actsparse.report.figures.columns import as_float
from actsparse.report.looks import DEPTH, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, number

LAYERS, NEURONS = 4, 40
PAPER_GREY = "#f1f4f7"


def correlations(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, rank, neuron, other_rank, other, phi, n`: of at most 40 of the hottest neurons of four layers."""
    names = [name.split(".") for name in panel.coactivation if name.endswith(".counts")]
    layers = spread([int(part[1]) for part in names if len(part) == 3 and part[1].isdigit()], LAYERS)
    tokens = panel.coactivation.get("tokens")
    total = int(np.asarray(tokens).reshape(-1)[0]) if tokens is not None and np.asarray(tokens).size else 0
    rows = [row for layer in layers for row in _rows(panel, layer, total)] if total else []
    schema = dict.fromkeys(("layer", "rank", "neuron", "other_rank", "other"), pl.Int64)
    return pl.DataFrame(rows, schema=schema | {"phi": pl.Float64, "n": pl.Int64}, orient="row")


def _rows(panel: ProfilePanel, layer: int, total: int) -> list[tuple[object, ...]]:
    counts = np.asarray(panel.coactivation[f"layers.{layer}.counts"], dtype=np.float64)[:NEURONS, :NEURONS]
    neurons = np.asarray(panel.coactivation.get(f"layers.{layer}.neurons", ()), dtype=np.int64)[:NEURONS]
    if counts.ndim != 2 or len(neurons) != len(counts):
        return []
    rate = counts.diagonal() / total
    room = np.sqrt(np.outer(rate * (1 - rate), rate * (1 - rate)))
    with np.errstate(divide="ignore", invalid="ignore"):
        phi = np.where(room > 0, (counts / total - np.outer(rate, rate)) / room, np.nan)
    return [
        (layer, one + 1, int(neurons[one]), other + 1, int(neurons[other]), _known(phi[one, other]), total)
        for one in range(len(neurons))
        for other in range(len(neurons))
        if one != other
    ]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    layers = frame["layer"].unique().sort().to_list()
    size = int(as_float(frame["rank"].max()))
    top = max(0.1, min(1.0, as_float(frame["phi"].abs().quantile(0.99))))
    figure = canvas(
        x="neuron, by how often it fires (1: hottest)",
        y="neuron",
        height=440,
        x_axis={"showgrid": False, "constrain": "domain"},
        y_axis={"showgrid": False, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    )
    grids = {layer: _grid(frame.filter(pl.col("layer") == layer), size) for layer in layers}
    figure.add_heatmap(
        x=list(range(1, size + 1)),
        y=list(range(1, size + 1)),
        z=np.stack([floats(row) for row in grids[layers[0]]]),
        zmin=-top,
        zmax=top,
        colorscale=[[0, DEPTH[0]], [0.5, PAPER_GREY], [1, DEPTH[4]]],
        colorbar=colour_bar("phi (0: independent)", tickformat=".1f"),
        hovertemplate="neurons of rank %{x} and %{y}: phi %{z:.2f}<extra></extra>",
    )
    if len(layers) > 1:
        choices = [
            {
                "label": f"layer {layer}",
                "axis": "z",
                "title": "",
                "values": [[[_known(value) for value in row] for row in grids[layer]]],
            }
            for layer in layers
        ]
        set_variants(figure, name="shown", variants=choices)
    return figure


def _grid(rows: pl.DataFrame, size: int) -> np.ndarray:
    grid = np.full((size, size), np.nan)
    for one, other, phi in rows.select("rank", "other_rank", "phi").iter_rows():
        grid[one - 1, other - 1] = np.nan if phi is None else phi
    return grid


def caption(frame: pl.DataFrame) -> str:
    """The mean correlation in the layers shown, and the closest pair."""
    means = frame.group_by("layer", maintain_order=True).agg(pl.col("phi").mean()).sort("phi")
    low, high = means.row(0), means.row(-1)
    closest = frame.sort("phi", nulls_last=False).row(-1, named=True)
    mean = as_float(frame["phi"].mean())
    together = "fire nearly independently" if abs(mean) < 0.05 else "fire together" if mean > 0 else "avoid each other"
    ends = f"{number(low[1], 2)} in layer {low[0]} to {number(high[1], 2)} in layer {high[0]}"
    return (
        f"The hottest neurons {together}: mean phi {ends}. Closest are neurons {closest['neuron']} and "
        f"{closest['other']} of layer {closest['layer']}, phi {number(closest['phi'], 2)}. "
        f"n = {count(int(frame['n'][0]))} tokens."
    )
