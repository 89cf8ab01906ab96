"""SI1: how soon the mask of the first P tokens settles."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, spread
from actsparse.report.figures.columns import as_float, counted, first_known, measured
from actsparse.report.figures.marks import add_line, log2_axis
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import number, span


def curves(panel: ProfilePanel) -> pl.DataFrame:
    """`layer` (null: mean), `pop, r, p, value, low, high, n, p90`: kappa of the prefix mask with later masks."""
    frame = measured(panel.measures, "si1", numbers=("r", "p", "delta"), texts=("pop",)).filter(
        pl.col("delta").is_null()
    )
    frame = frame.drop("delta").with_columns(pl.col("pop").fill_null("")).drop_nulls("p")
    p90 = measured(panel.measures, "si1_p90", numbers=("r",), texts=("pop",)).filter(pl.col("layer").is_null())
    p90 = p90.select("r", pl.col("pop").fill_null(""), p90="value")
    frame = frame.filter(pl.col("r") == frame["r"].min()) if frame.height else frame
    return frame.join(p90, on=["r", "pop"], how="left", maintain_order="left").sort("pop", "layer", "p")


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="prompt tokens that the mask is made from, P (log)",
        y=f"kappa with later tokens' masks ({frame['r'].min():.0%} kept)",
        x_axis=log2_axis(),
        y_axis={"tickformat": ".2f", "rangemode": "tozero"},
    )
    layers = spread(frame["layer"].drop_nulls().to_list())
    for place, layer in enumerate(layers):
        rows = frame.filter((pl.col("layer") == layer) & (pl.col("pop") == ""))
        colour = DEPTH[round(place * 4 / max(1, len(layers) - 1))]
        rows = rows.drop("low", "high")
        add_line(
            figure, rows, x="p", y="value", name=f"layer {layer}", colour=colour, width=1.1, markers=False,
            hover="P = %{x}: %{y:.3f}",
        )  # fmt: skip
    for pop, name, colour, dash in (
        ("", "mean, uniform chance", INK, "solid"),
        ("nat", "mean, popularity", INK, "dot"),
    ):
        rows = frame.filter(pl.col("layer").is_null() & (pl.col("pop") == pop))
        if rows.height:
            add_line(
                figure, rows, x="p", y="value", name=name, colour=colour, dash=dash, width=2.6,
                hover="P = %{x}: %{y:.3f}",
            )  # fmt: skip
    p90 = first_known(frame.filter(pl.col("pop") == "")["p90"])
    if p90 is not None:
        figure.add_shape(
            type="line", x0=p90, x1=p90, y0=0, y1=1, yref="paper", line={"color": MUTED, "width": 1, "dash": "dot"},
            label={"text": "P90", "textposition": "end", "font": {"size": 11, "color": MUTED}},
        )  # fmt: skip
    add_reference(figure, y=0.0)
    return figure


def caption(frame: pl.DataFrame) -> str:
    """Where the curve settles, at what height, and what is left above a static hot set."""
    mean = frame.filter(pl.col("layer").is_null())
    uniform, popular = (mean.filter(pl.col("pop") == pop).sort("p") for pop in ("", "nat"))
    count = counted(frame, "sequences")
    if uniform.is_empty():
        return f"The prefix curve was measured by layer only.{count}"
    last, p90 = uniform.row(-1, named=True), first_known(uniform["p90"])
    settled = "Masks do not settle"
    if p90 is not None:
        settled = f"Masks reach 90\u202f% of their agreement after {p90:.0f} prompt tokens"
        settled += ", the most that were measured" if p90 >= last["p"] else ""
    interval = span(last["low"], last["high"])
    text = f"{settled}; at P = {last['p']:.0f} they agree with later tokens by kappa {number(last['value'], 2)}"
    text += f" ({interval})" if interval else ""
    if popular.height:
        kappa = as_float(popular["value"][-1])
        share = kappa / last["value"] if last["value"] else 0.0
        rest = "nearly all of it is a static hot set" if share < 0.25 else "a static hot set explains only part of it"
        text += f", by {number(kappa, 2)} above popularity: {rest}"
    return f"{text}.{count}"
