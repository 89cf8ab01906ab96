"""CETT: the sparsity at a target error layer by layer, and the error as sparsity grows."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, floats, integers, layer_axis, spread
from actsparse.report.figures.columns import param
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import count, listed, percent

_TARGET_COLOURS = (DEPTH[0], DEPTH[4], DEPTH[2], DEPTH[1], DEPTH[3])


def layers(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, target, sparsity, stderr, n, rho, low, high, mixed`: share of neurons below the CETT threshold; `low` and
    `high` hold the middle 80 % of tokens where that was measured; `mixed`: over a mixture of experts."""
    measures = panel.measures.filter(pl.col("layer").is_not_null())
    rho = measures.filter(pl.col("metric") == "cett_rho").select("layer", rho="value")
    rows = measures.filter((pl.col("metric") == "cett_sparsity") & pl.col("value").is_not_null())
    frame = rows.select("layer", target=param("target"), sparsity="value", stderr="stderr", n="n")
    frame = frame.join(rho, on="layer", how="left", maintain_order="left").drop_nulls("target")
    for end, metric in (("low", "cett_sparsity_p10"), ("high", "cett_sparsity_p90")):
        band = measures.filter(pl.col("metric") == metric).select("layer", target=param("target"), value="value")
        frame = frame.join(band.rename({"value": end}), on=["layer", "target"], how="left", maintain_order="left")
    return frame.sort("target", "layer").with_columns(_mixed(panel))


def draw_layers(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y="neurons below the threshold (share)",
        x_axis=layer_axis(frame),
        y_axis={"range": [0, 1.02], "tickformat": ".0%"},
    )
    for place, (target, rows) in enumerate(_by(frame, "target")):
        colour = _TARGET_COLOURS[place % len(_TARGET_COLOURS)]
        known = rows["stderr"].is_not_null().any()
        _add_band(figure, rows.drop_nulls(["low", "high"]), colour, f"CETT {target:g}")
        figure.add_scatter(
            x=integers(rows["layer"]),
            y=floats(rows["sparsity"]),
            error_y={"type": "data", "array": floats(rows["stderr"] * 1.96), "thickness": 1, "width": 0}
            if known
            else None,
            mode="lines+markers",
            name=f"CETT {target:g}",
            line={"color": colour, "width": 1.8},
            marker={"size": 5, "color": colour},
            hovertemplate=f"layer %{{x}}: %{{y:.1%}} of neurons<extra>CETT {target:g}</extra>",
        )
    return figure


def _add_band(figure: go.Figure, rows: pl.DataFrame, colour: str, name: str) -> None:
    """The middle 80 % of tokens as a band behind the line."""
    if rows.is_empty():
        return
    figure.add_scatter(
        x=[*rows["layer"].to_list(), *reversed(rows["layer"].to_list())],
        y=[*rows["high"].to_list(), *reversed(rows["low"].to_list())],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=colour,
        opacity=0.18,
        hoverinfo="skip",
        name=f"{name}, 80 % of tokens",
    )


def caption_layers(frame: pl.DataFrame) -> str:
    """Mean sparsity at each target, and where it is highest and lowest."""
    means = frame.group_by("target", maintain_order=True).agg(pl.col("sparsity").mean())
    parts = listed([f"{percent(mean)} at CETT {target:g}" for target, mean in means.iter_rows()])
    middle = means["target"].to_list()[len(means) // 2]
    rows = frame.filter(pl.col("target") == middle).sort("sparsity")
    low, high = rows.row(0, named=True), rows.row(-1, named=True)
    spread_text = (
        f" At {middle:g} it runs from {percent(low['sparsity'])} (layer {low['layer']}) to {percent(high['sparsity'])} "
        f"(layer {high['layer']})."
        if rows.height > 1
        else ""
    )
    rho = frame["rho"].mean()
    rho_text = f" Mean rho {rho:.2f}: {_rho(rho)}." if isinstance(rho, float) else ""
    layer_count = f"{rows.height} layer{'s' * (rows.height > 1)}"
    return f"Mean sparsity over {layer_count}: {parts}.{spread_text}{rho_text}{_count(frame)}"


def _rho(rho: float) -> str:
    if rho > 1.25:
        return "neuron outputs cancel each other"
    return "neuron outputs add up" if rho < 0.8 else "neuron outputs are nearly orthogonal"


def curve(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, sparsity, cett, stderr, n, mixed`: mean CETT of a layer at a share of dropped neurons."""
    rows = panel.measures.filter(
        (pl.col("metric") == "cett_curve") & pl.col("layer").is_not_null() & pl.col("value").is_not_null()
    )
    frame = rows.select("layer", sparsity=param("sparsity"), cett="value", stderr="stderr", n="n")
    return frame.drop_nulls("sparsity").sort("layer", "sparsity").with_columns(_mixed(panel))


def _mixed(panel: ProfilePanel) -> pl.Expr:
    """Whether a layer is a mixture of experts, whose `n` counts a token once at each expert that serves it."""
    own = panel.measures.filter(pl.col("metric") == "expert_cett_rho")["layer"].unique()
    return pl.col("layer").is_in(own.to_list()).alias("mixed")


def draw_curve(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="neurons dropped (share)",
        y="CETT (error norm / output norm)",
        x_axis={"range": [0, 1], "tickformat": ".0%"},
        y_axis={"rangemode": "tozero"},
    )
    shown = spread(frame["layer"].to_list())
    for layer, rows in _by(frame, "layer"):
        marked = layer in shown
        colour = DEPTH[round(shown.index(layer) * 4 / max(1, len(shown) - 1))] if marked else MUTED
        figure.add_scatter(
            x=floats(rows["sparsity"]),
            y=floats(rows["cett"]),
            mode="lines",
            name=f"layer {layer}",
            showlegend=marked,
            opacity=1 if marked else 0.28,
            line={"color": colour, "width": 1.8 if marked else 1},
            hovertemplate=f"%{{x:.0%}} dropped: CETT %{{y:.3f}}<extra>layer {layer}</extra>",
        )
    mean = _mean_curve(frame)
    if frame["layer"].n_unique() > 1 and mean.height > 1:
        figure.add_scatter(
            x=floats(mean["sparsity"]),
            y=floats(mean["cett"]),
            mode="lines",
            name="mean",
            line={"color": INK, "width": 2.6},
            hovertemplate="%{x:.0%} dropped: CETT %{y:.3f}<extra>mean over layers</extra>",
        )
    add_reference(figure, y=0.2, text="CETT 0.2", at="start")
    return figure


def _mean_curve(frame: pl.DataFrame) -> pl.DataFrame:
    """The mean over layers on a common grid, each layer's curve read between its points."""
    layer_count = frame["layer"].n_unique()
    grid = (
        frame.group_by(pl.col("sparsity").round(2), maintain_order=True)
        .agg(pl.col("cett").mean(), pl.col("layer").n_unique())
        .sort("sparsity")
    )
    return grid.filter(pl.col("layer") == layer_count)


def caption_curve(frame: pl.DataFrame) -> str:
    """How much can be dropped before the error reaches 0.2, at the layers that allow most and least."""
    reached = (
        frame.filter(pl.col("cett") <= 0.2)
        .group_by("layer", maintain_order=True)
        .agg(pl.col("sparsity").max())
        .sort("sparsity")
    )
    if reached.is_empty():
        return f"No layer stays below CETT 0.2 at the shares measured.{_count(frame)}"
    (least, low), (most, high) = reached.row(0), reached.row(-1)
    if least == most:
        return f"Layer {most} loses {percent(high, 0)} of its neurons before CETT passes 0.2.{_count(frame)}"
    if percent(low, 0) == percent(high, 0):
        return f"Before CETT passes 0.2, every layer can lose {percent(high, 0)} of its neurons.{_count(frame)}"
    return (
        f"Before CETT passes 0.2, layer {most} can lose {percent(high, 0)} of its neurons and layer {least} only "
        f"{percent(low, 0)}; the mean over layers is {percent(_mean(reached['sparsity']), 0)}.{_count(frame)}"
    )


def _mean(values: pl.Series) -> float:
    mean = values.mean()
    return mean if isinstance(mean, float) else 0.0


def _count(frame: pl.DataFrame) -> str:
    most = frame["n"].max()
    what = "token positions, each at every expert that serves it" if frame["mixed"].any() else "token positions"
    return f" n = {count(most)} {what}." if isinstance(most, int) and most else ""


def _by(frame: pl.DataFrame, column: str) -> list[tuple[Any, pl.DataFrame]]:
    return [(key[0], rows) for key, rows in frame.partition_by(column, as_dict=True, maintain_order=True).items()]
