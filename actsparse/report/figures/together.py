"""Models in one frame: sparsity at equal CETT over relative depth, and quality kept against bytes."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures import cett
from actsparse.report.figures.canvas import add_reference, canvas, floats, look_of, plain
from actsparse.report.figures.columns import as_float
from actsparse.report.figures.marks import add_line
from actsparse.report.looks import DEPTH, GOOD, INK, MUTED, Looks
from actsparse.report.panels import EvalPanel, ProfilePanel
from actsparse.report.plans import Role
from actsparse.report.verdicts import USABLE
from actsparse.report.wording import listed, number, one_line, percent

MODEL_COLOURS = (DEPTH[0], DEPTH[4], INK, MUTED)
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond-open", "square", "triangle-up-open")
TARGET = 0.2


def sparsity(panels: tuple[ProfilePanel, ...]) -> pl.DataFrame:
    """`model, layer, depth, target, sparsity, low, high, n`: CETT sparsity of all profiles at a shared target."""
    parts = []
    for panel in panels:
        frame = cett.layers(panel)
        layers = max(1, panel.source.manifest.model.layers - 1) if panel.source.manifest.model else 1
        parts.append(
            frame.select(
                "layer", "target", "sparsity", "n", model=pl.lit(one_line(panel.label)), depth=pl.col("layer") / layers,
                low=pl.col("sparsity") - 1.96 * pl.col("stderr"), high=pl.col("sparsity") + 1.96 * pl.col("stderr"),
            )
        )  # fmt: skip
    frame = pl.concat(parts)
    shared = [target for target, count in _models_by(frame, "target") if count == len(panels)]
    if not shared:
        return frame.clear()
    target = TARGET if TARGET in shared else shared[len(shared) // 2]
    return frame.filter(pl.col("target") == target).select(
        "model", "layer", "depth", "target", "sparsity", "low", "high", "n"
    )


def _models_by(frame: pl.DataFrame, column: str) -> list[tuple[Any, int]]:
    return list(frame.group_by(column, maintain_order=True).agg(pl.col("model").n_unique()).sort(column).iter_rows())


def draw_sparsity(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="depth (0: first layer, 1: last)",
        y=f"neurons below the threshold at CETT {frame['target'][0]:g} (share)",
        height=380,
        x_axis={"range": [-0.02, 1.02]},
        y_axis={"range": [0, 1.02], "tickformat": ".0%"},
    )
    for place, model in enumerate(dict.fromkeys(frame["model"])):
        add_line(
            figure, frame.filter(pl.col("model") == model).sort("depth"), x="depth", y="sparsity", name=model,
            colour=MODEL_COLOURS[place % 4], dash=DASHES[place % 4], symbol=SYMBOLS[place % 4],
            hover="depth %{x:.2f}: %{y:.1%}",
        )  # fmt: skip
    return figure


def caption_sparsity(frame: pl.DataFrame) -> str:
    """The mean sparsity of each model, and how far the others lie from the reference."""
    means = list(frame.group_by("model", maintain_order=True).agg(pl.col("sparsity").mean()).iter_rows())
    (first, reference), rest = means[0], means[1:]
    moved = listed([f"{model} {percent(mean)} ({_points(mean - reference)})" for model, mean in rest])
    target = frame["target"][0]
    return f"Mean over layers at CETT {target:g}: {first} {percent(reference)}; {moved}."


def _points(difference: float) -> str:
    return f"{percent(difference, signed=True)[:-2]} points"


def quality(panels: tuple[EvalPanel, ...]) -> pl.DataFrame:
    """`model, plan, series, role, bytes, ratio, low, high, n`: perplexity over each model's own dense, by bytes."""
    rows = []
    for panel in panels:
        for outcome in panel.compared:
            dense, share = outcome.dense_ppl.value, outcome.realised.get("model_bytes_frac")
            if outcome.ppl.value is None or not dense or share is None or outcome.name.role is Role.ORACLE:
                continue
            ends = [None if end is None else end / dense for end in (outcome.ppl.low, outcome.ppl.high)]
            rows.append(
                (one_line(panel.label), outcome.label, outcome.name.series, outcome.name.role.value, share,
                 outcome.ppl.value / dense, *ends, outcome.ppl.n)
            )  # fmt: skip
    numbers = dict.fromkeys(("bytes", "ratio", "low", "high"), pl.Float64)
    schema = dict.fromkeys(("model", "plan", "series", "role"), pl.String) | numbers | {"n": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    shared = [series for series, count in _models_by(frame, "series") if count > 1]
    return frame.filter(pl.col("series").is_in(shared))


def draw_quality(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """One line a method and model: the colour is the method's, the dash the model's. All start at dense."""
    figure = canvas(
        x="weight bytes of a decode step not read (share of the model, realised)",
        y="perplexity over the model's own dense (×, log)",
        height=420,
        x_axis={"rangemode": "tozero", "tickformat": ".2~p"},
        y_axis={"type": "log"},
    )
    figure.add_shape(
        type="rect", x0=0, x1=1, xref="paper", y0=1, y1=1 + USABLE, fillcolor=GOOD, opacity=0.16, line_width=0,
        layer="below",
    )  # fmt: skip
    models = list(dict.fromkeys(frame["model"]))
    for series in dict.fromkeys(frame["series"]):
        for place, model in enumerate(models):
            rows = frame.filter((pl.col("model") == model) & (pl.col("series") == series)).sort("bytes")
            if rows.is_empty():
                continue
            look = look_of(looks, rows["plan"][0])
            figure.add_scatter(
                x=floats([0.0, *rows["bytes"]]),
                y=floats([1.0, *rows["ratio"]]),
                mode="lines+markers",
                name=f"{plain(series)}, {plain(model)}",
                line={"color": look.colour, "width": 1.3 if look.baseline else 2, "dash": DASHES[place % 4]},
                marker={"size": [0] + [7] * rows.height, "color": look.colour, "symbol": SYMBOLS[place % 4]},
                hovertemplate=f"%{{x:.1%}}: %{{y:.3g}}× dense<extra>{plain(series)}, {plain(model)}</extra>",
            )
    add_reference(figure, y=1.0, text="dense", at="start")
    return figure


def caption_quality(frame: pl.DataFrame) -> str:
    """At the plan that both models hold and that loses most, which model keeps more; and how often the second does."""
    models = list(dict.fromkeys(frame["model"]))
    first, other = models[0], models[1]
    pairs = (
        frame.filter(pl.col("model") == first)
        .join(frame.filter(pl.col("model") == other), on="plan", suffix="_other", maintain_order="left")
        .filter(pl.col("role") == Role.METHOD)
    )
    if pairs.is_empty():
        return f"{first} and {other} share methods but no plan; compare the lines at equal bytes."
    better = pairs.filter(pl.col("ratio_other") < pl.col("ratio")).height
    row = pairs.sort("ratio").row(-1, named=True)
    bytes_ = f"{percent(row['bytes'], 0)} and {percent(row['bytes_other'], 0)} of the bytes not read"
    ratios = f"{number(row['ratio'])}× on {first} and {number(row['ratio_other'])}× on {other}"
    return (
        f"{row['plan']} costs {ratios} ({bytes_}); of {pairs.height} plans on both, {better} "
        f"lose{'s' if better == 1 else ''} less on {other}. n = {int(as_float(frame['n'].max()))} scored tokens a plan."
    )
