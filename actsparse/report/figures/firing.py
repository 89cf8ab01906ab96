"""How unequally neurons fire: sorted rates of a few layers, and Gini, hot and dead shares of every layer."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, floats, integers, layer_axis, spread
from actsparse.report.figures.columns import as_float, counted
from actsparse.report.looks import DEPTH, INK, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import percent

POINTS = 160
SHARES = {"neuron_gini": "Gini coefficient", "hot_frac": "hot (active in over 50 %)", "dead_frac": "dead (under 0.1 %)"}


def rates(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, rank, active_frac, gini, n`: firing rates from most to least active, thinned to 160 points a layer."""
    gini = _measure(panel, "neuron_gini").select("layer", gini="value")
    layers = spread(panel.neurons["layer"].to_list())
    parts = [_sorted(panel.neurons.filter(pl.col("layer") == layer)) for layer in layers]
    empty = pl.DataFrame(schema={"layer": pl.Int64, "rank": pl.Float64, "active_frac": pl.Float64, "n": pl.Int64})
    return pl.concat([empty, *parts]).join(gini, on="layer", how="left", maintain_order="left")


def _sorted(neurons: pl.DataFrame) -> pl.DataFrame:
    ordered = neurons.select("layer", "active_frac").drop_nulls().sort("active_frac", descending=True)
    count = ordered.height
    kept = sorted({round(step * (count - 1) / (POINTS - 1)) for step in range(POINTS)}) if count else []
    rank = pl.Series("rank", [(place + 0.5) / count for place in kept], dtype=pl.Float64)
    return ordered[kept].with_columns(rank=rank, n=pl.lit(count, pl.Int64)).select("layer", "rank", "active_frac", "n")


def draw_rates(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="neurons, most active first (share)",
        y="active in (share of tokens)",
        x_axis={"range": [0, 1], "tickformat": ".0%"},
        y_axis={"range": [0, 1.02], "tickformat": ".0%"},
    )
    layers = frame["layer"].unique().sort().to_list()
    for place, layer in enumerate(layers):
        rows = frame.filter(pl.col("layer") == layer)
        gini = rows["gini"][0]
        figure.add_scatter(
            x=floats(rows["rank"]),
            y=floats(rows["active_frac"]),
            mode="lines",
            name=f"layer {layer}" + (f", Gini {gini:.2f}" if gini is not None else ""),
            line={"color": DEPTH[round(place * 4 / max(1, len(layers) - 1))], "width": 1.8},
            hovertemplate=f"top %{{x:.1%}}: active in %{{y:.1%}}<extra>layer {layer}</extra>",
        )
    add_reference(figure, y=0.2, text="all equal: 20 %")
    return figure


def caption_rates(frame: pl.DataFrame) -> str:
    """How often the busiest and the idlest tenth fire, over the layers shown."""
    top = frame.filter(pl.col("rank") <= 0.1)["active_frac"].mean()
    bottom = frame.filter(pl.col("rank") >= 0.9)["active_frac"].mean()
    gini = frame.group_by("layer", maintain_order=True).agg(pl.col("gini").first())["gini"].mean()
    even = f"; mean Gini {gini:.2f} (0: all fire alike, 1: one fires)" if isinstance(gini, float) else ""
    return (
        f"The busiest tenth of neurons is in the top 20 % for {percent(as_float(top), 0)} of tokens, the "
        f"idlest tenth for {percent(as_float(bottom))}{even}. n = {frame['n'][0]} neurons a layer."
    )


def shares(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, metric, value, n`: Gini coefficient, hot and dead share, of so many neurons."""
    found = pl.concat([_measure(panel, metric) for metric in SHARES])
    # rows of an expert count its tokens
    neurons = panel.neurons.group_by("layer", maintain_order=True).agg(neurons=pl.len().cast(pl.Int64))
    found = found.join(neurons, on="layer", how="left", maintain_order="left")
    return found.with_columns(n=pl.coalesce("neurons", "n")).drop("neurons")


def _measure(panel: ProfilePanel, metric: str) -> pl.DataFrame:
    rows = panel.measures.filter(
        (pl.col("metric") == metric) & pl.col("layer").is_not_null() & pl.col("value").is_not_null()
    )
    means = pl.col("value").mean(), pl.col("n").sum()  # of a layer's experts, where it has some
    return rows.group_by("layer", "metric", maintain_order=True).agg(*means).sort("layer")


def draw_shares(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y="Gini (1), hot and dead (share)",
        x_axis=layer_axis(frame),
        y_axis={"range": [0, 1.02], "tickformat": ".1f"},
    )
    for metric, colour, dash in (
        ("neuron_gini", INK, "solid"),
        ("hot_frac", DEPTH[4], "solid"),
        ("dead_frac", DEPTH[0], "dash"),
    ):
        rows = frame.filter(pl.col("metric") == metric)
        if rows.height:
            figure.add_scatter(
                x=integers(rows["layer"]),
                y=floats(rows["value"]),
                mode="lines+markers",
                name=SHARES[metric],
                line={"color": colour, "width": 1.8, "dash": dash},
                marker={"size": 4},
                hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>{SHARES[metric]}</extra>",
            )
    return figure


def caption_shares(frame: pl.DataFrame) -> str:
    """The most unequal layer, and how many neurons are hot or dead."""
    gini = frame.filter(pl.col("metric") == "neuron_gini").sort("value")
    means = {
        metric: as_float(rows["value"].mean())
        for metric in ("hot_frac", "dead_frac")
        for rows in [frame.filter(pl.col("metric") == metric)]
    }
    text = f"On average {percent(means['hot_frac'])} of neurons are hot and {percent(means['dead_frac'])} dead"
    if gini.height:
        row = gini.row(-1, named=True)
        text += f"; activity is most unequal in layer {row['layer']} (Gini {row['value']:.2f})"
    return f"{text}.{counted(frame, 'neurons a layer')}"
