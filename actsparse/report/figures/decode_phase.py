"""The prompt beside what the model writes itself: sparsity at equal CETT in both phases."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, layer_axis
from actsparse.report.figures.columns import as_float, counted, param
from actsparse.report.figures.marks import add_line
from actsparse.report.looks import DEPTH, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import percent

TARGET = 0.2
PHASES = {
    "prefill": ("prompt (prefill)", DEPTH[0], "solid"),
    "decode": ("the model's own tokens (decode)", DEPTH[4], "dash"),
}


def sparsity(panel: ProfilePanel) -> pl.DataFrame:
    """`phase, layer, sparsity, low, high, n` at CETT 0.2; empty unless both phases were recorded."""
    parts = [
        table.filter((pl.col("metric") == "cett_sparsity") & pl.col("value").is_finite())
        .with_columns(target=param("target"))
        .filter((pl.col("target") == TARGET) & pl.col("layer").is_not_null())
        .select(
            "layer", "n", phase=pl.lit(phase), sparsity="value",
            low=pl.col("value") - 1.96 * pl.col("stderr"), high=pl.col("value") + 1.96 * pl.col("stderr"),
        )
        for phase, table in (("prefill", panel.measures), ("decode", panel.decode))
    ]  # fmt: skip
    frame = pl.concat(parts).select("phase", "layer", "sparsity", "low", "high", "n").sort("phase", "layer")
    return frame if frame["phase"].n_unique() == 2 else frame.clear()


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y=f"neurons below the threshold at CETT {TARGET:g} (share)",
        x_axis=layer_axis(frame),
        y_axis={"range": [0, 1.02], "tickformat": ".0%"},
    )
    for phase, (name, colour, dash) in PHASES.items():
        rows = frame.filter(pl.col("phase") == phase)
        add_line(
            figure, rows, x="layer", y="sparsity", name=name, colour=colour, dash=dash, hover="layer %{x}: %{y:.1%}"
        )
    return figure


def caption(frame: pl.DataFrame) -> str:
    """Both means, and the layer where the phases differ most."""
    wide = frame.pivot("phase", index="layer", values="sparsity").with_columns(gap=pl.col("decode") - pl.col("prefill"))
    before, after = as_float(wide["prefill"].mean()), as_float(wide["decode"].mean())
    row = wide.drop_nulls("gap").sort(pl.col("gap").abs()).row(-1, named=True)
    change = f"{percent(after - before, signed=True)[:-2]} points"
    most = f"{percent(row['gap'], signed=True)[:-2]} points in layer {row['layer']}"
    return (
        f"Mean sparsity is {percent(before)} over the prompt and {percent(after)} over the model's own tokens "
        f"({change}); they differ most by {most}.{counted(frame, 'positions at most')}"
    )
