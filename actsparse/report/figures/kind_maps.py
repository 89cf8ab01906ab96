"""Layer x kind heat maps of sparsity: what can be dropped at one error, what is nearly zero, what is exactly zero."""

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, colour_bar, floats, layer_axis, set_variants, shares_scale
from actsparse.report.figures.columns import as_float
from actsparse.report.looks import Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, percent
from actsparse.results import SiteKind

NO_ZEROS = 0.02
_ORDER = [*(kind.value for kind in SiteKind), *(f"shared_{kind.value}" for kind in SiteKind)]


def below_error(counts: np.ndarray, edges: np.ndarray, error: float) -> float:
    """The share of the smallest values whose energy is at most `error`² of all energy: dropping them moves x by that.

    Energies are those of the middles of bins; a bin that the limit falls into is counted in part.
    """
    energy = counts * _middles(edges) ** 2
    reached = np.concatenate([[0.0], np.cumsum(energy)])
    held = np.concatenate([[0.0], np.cumsum(counts)])
    return float(np.interp(error**2 * reached[-1], reached, held) / held[-1]) if reached[-1] > 0 else 1.0


def below_rms(counts: np.ndarray, edges: np.ndarray, part: float) -> float:
    """The share of values under `part` of their root mean square."""
    rms = np.sqrt((counts * _middles(edges) ** 2).sum() / counts.sum())
    held = np.concatenate([[0.0], np.cumsum(counts)])
    return float(np.interp(part * rms, edges, held) / held[-1]) if rms > 0 else 1.0


def _middles(edges: np.ndarray) -> np.ndarray:
    """Where the values of each bin stand: its middle; 0 in the first one, which holds zeros and what counts as zero."""
    middles = np.where(np.isfinite(edges[1:]), (edges[:-1] + edges[1:]) / 2, edges[:-1])
    return np.where(edges[:-1] > 0, middles, 0.0)


Measure = Callable[[np.ndarray, np.ndarray], float]
SPARSITIES: dict[str, tuple[str, str, Measure]] = {
    "error=0.2": (
        "dropped at 20 % error of the activation",
        "smallest values that can go (share)",
        lambda counts, edges: below_error(counts, edges, 0.2),
    ),
    "error=0.05": (
        "dropped at 5 % error of the activation",
        "smallest values that can go (share)",
        lambda counts, edges: below_error(counts, edges, 0.05),
    ),
    "rms=0.1": (
        "nearly zero: under 10 % of the rms",
        "values under 10 % of the rms (share)",
        lambda counts, edges: below_rms(counts, edges, 0.1),
    ),
    "rms=0.01": (
        "nearly zero: under 1 % of the rms",
        "values under 1 % of the rms (share)",
        lambda counts, edges: below_rms(counts, edges, 0.01),
    ),
}
ZERO = "zero"


def sparsity(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, kind, measure, value, n`: shares of sparse values by several measures, from the run's histograms."""
    rows = []
    for name in panel.histograms:
        parts = name.split(".")
        if len(parts) != 4 or parts[3] != "counts" or not parts[1].isdigit():
            continue
        counts = np.asarray(panel.histograms[name], dtype=np.float64)
        edges = np.asarray(panel.histograms.get(f"{name.removesuffix('counts')}edges", ()), dtype=np.float64)
        if len(edges) == len(counts) + 1 and counts.sum() > 0:
            rows += [
                (int(parts[1]), parts[2], measure, share(counts, edges), int(counts.sum()))
                for measure, (_, _, share) in SPARSITIES.items()
            ]
    schema = {"layer": pl.Int64, "kind": pl.String, "measure": pl.String, "value": pl.Float64, "n": pl.Int64}
    found = pl.DataFrame(rows, schema=schema, orient="row")
    if found.is_empty():
        return found
    return pl.concat([found, _zeros(panel).with_columns(measure=pl.lit(ZERO)).select(found.columns)])


def zeros(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, kind, value, n`: the share of exact zeros; empty where there are practically none."""
    found = _zeros(panel)
    largest = found["value"].max()
    return found if isinstance(largest, float) and largest >= NO_ZEROS else found.clear()


def _zeros(panel: ProfilePanel) -> pl.DataFrame:
    rows = panel.measures.filter(
        (pl.col("metric") == "zero_frac")
        & (pl.col("param").fill_null("") == "")
        & pl.col("layer").is_not_null()
        & pl.col("value").is_not_null()
    )
    return rows.select("layer", "kind", "value", "n").sort("layer")


def draw_sparsity(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """One map; the menu changes what counts as sparse."""
    first, *others = [measure for measure in SPARSITIES if measure in set(frame["measure"])]
    shown = [first, *others, *([ZERO] if (frame["measure"] == ZERO).any() else [])]
    grids = {measure: _grid(frame.filter(pl.col("measure") == measure), frame) for measure in shown}
    figure = _map(frame, grids[first], title="share")
    figure.data[0].hovertemplate = "layer %{x}, %{y}: %{z:.1%}<extra></extra>"
    choices = [
        {"label": _label(measure), "axis": "z", "title": "", "values": [[row.tolist() for row in grids[measure]]]}
        for measure in shown
    ]
    set_variants(figure, name="counted as sparse", variants=choices)
    return figure


def _label(measure: str) -> str:
    return "exact zeros" if measure == ZERO else SPARSITIES[measure][0]


def draw_zeros(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = _map(frame, _grid(frame, frame), title="exact zeros (share)")
    figure.data[0].hovertemplate = "layer %{x}, %{y}<br>%{z:.1%} exact zeros<extra></extra>"
    return figure


def _kinds(frame: pl.DataFrame) -> list[str]:
    present = set(frame["kind"].unique())
    return [kind for kind in _ORDER if kind in present] + sorted(present - set(_ORDER))


def _grid(rows: pl.DataFrame, frame: pl.DataFrame) -> list[np.ndarray]:
    """The values of `rows` on the kinds and layers of `frame`."""
    layers = frame["layer"].unique().sort().to_list()
    values = {(layer, kind): value for layer, kind, value in rows.select("layer", "kind", "value").iter_rows()}
    return [floats(values.get((layer, kind)) for layer in layers) for kind in _kinds(frame)]


def _map(frame: pl.DataFrame, grid: list[np.ndarray], *, title: str) -> go.Figure:
    kinds = _kinds(frame)
    axis: dict[str, Any] = {"showgrid": False, **layer_axis(frame)}
    figure = canvas(
        x="layer",
        y="",
        height=96 + 34 * len(kinds),
        x_axis=axis,
        y_axis={"showgrid": False, "autorange": "reversed", "type": "category", "ticks": ""},
    )
    figure.add_heatmap(
        x=frame["layer"].unique().sort().to_list(),
        y=kinds,
        z=np.stack(grid),
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        colorscale=shares_scale(),
        colorbar=colour_bar(title, tickformat=".0%"),
    )
    return figure


def caption_sparsity(frame: pl.DataFrame) -> str:
    """What the first map shows, the sparsest and densest kind, and whether there are exact zeros."""
    measure = next(measure for measure in SPARSITIES if measure in set(frame["measure"]))
    rows = frame.filter(pl.col("measure") == measure)
    means = rows.group_by("kind", maintain_order=True).agg(pl.col("value").mean()).sort("value", "kind")
    (least, low), (most, high) = means.row(0), means.row(-1)
    best = rows.sort("value").row(-1, named=True)
    text = (
        f"Drawn: the share of the smallest values that can go before the activation is off by 20 %. Sparsest is {most}"
        f" with {percent(high, 0)} on average"
    )
    text += f", least sparse {least} with {percent(low, 0)}" if least != most else ""
    text += f"; at most {percent(best['value'], 0)} ({best['kind']}, layer {best['layer']})"
    return f"{text}{_values(frame)}.{_zeros_said(frame)}"


def _zeros_said(frame: pl.DataFrame) -> str:
    largest = frame.filter(pl.col("measure") == ZERO)["value"].max()
    if largest is None or as_float(largest) >= NO_ZEROS:
        return ""
    if as_float(largest) >= 5e-5:
        return f" Exact zeros are rare: {percent(as_float(largest), 2)} at most."
    return " There are no exact zeros."


def caption_zeros(frame: pl.DataFrame) -> str:
    """Which kind holds most zeros, and in which layer."""
    means = frame.group_by("kind", maintain_order=True).agg(pl.col("value").mean()).sort("value", descending=True)
    kind, mean = means.row(0)
    rows = frame.filter(pl.col("kind") == kind).sort("value")
    low, high = rows.row(0, named=True), rows.row(-1, named=True)
    return (
        f"Most exact zeros are in {kind}: {percent(mean)} on average, "
        f"from {percent(low['value'])} in layer {low['layer']} to "
        f"{percent(high['value'])} in layer {high['layer']}{_values(frame)}."
    )


def _values(frame: pl.DataFrame) -> str:
    most = frame["n"].max()
    return f"; n = {count(most)} values a cell at most" if isinstance(most, int) and most else ""
