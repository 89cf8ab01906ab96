"""Milliseconds of a timed generation by phase: prefill, selection, decode."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, plain
from actsparse.report.looks import DEPTH, STATIC_GREYS, Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import milliseconds, percent

COLOURS = {"prefill": STATIC_GREYS[2], "select": DEPTH[4], "decode": DEPTH[0]}
GENERATE = "dense, transformers generate"


def data(panel: EvalPanel) -> pl.DataFrame:
    """`arm, phase, ms, low, high, tokens, n`: medians over repetitions with their quartiles."""
    timing = panel.timing.filter(pl.col("seconds").is_finite())
    arm = (
        pl.when(pl.col("arm") == "dense")
        .then(pl.lit("dense"))
        .when(pl.col("arm") == "generate")
        .then(pl.lit(GENERATE))
        .otherwise("plan")
    )
    milli = pl.col("seconds") * 1000
    groups = timing.with_columns(arm=arm).group_by("arm", "phase", maintain_order=True)
    return groups.agg(
        ms=milli.median(),
        low=milli.quantile(0.25, "linear"),
        high=milli.quantile(0.75, "linear"),
        tokens=pl.col("tokens").median(),
        n=pl.len().cast(pl.Int64),
    )


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    arms = _arms(frame)
    figure = canvas(
        x="milliseconds (median of the timed repetitions)",
        y="",
        height=120 + 28 * len(arms),
        x_axis={"rangemode": "tozero"},
        y_axis={"autorange": "reversed", "type": "category", "ticks": "", "showline": False},
    )
    for phase, colour in COLOURS.items():
        rows = {row["arm"]: row for row in frame.filter(pl.col("phase") == phase).iter_rows(named=True)}
        if rows:
            figure.add_bar(
                x=floats(rows[arm]["ms"] if arm in rows else 0.0 for arm in arms),
                y=[plain(arm) for arm in arms],
                orientation="h",
                name={"select": "selection and slicing"}.get(phase, phase),
                marker={"color": colour, "line": {"width": 0}},
                customdata=[
                    [rows[arm]["low"], rows[arm]["high"], rows[arm]["tokens"], rows[arm]["n"]]
                    if arm in rows
                    else [0] * 4
                    for arm in arms
                ],
                hovertemplate=f"%{{y}}<br>{phase}: %{{x:.1f}} ms (%{{customdata[0]:.1f}}\u2013%{{customdata[1]:.1f}})"
                "<br>%{customdata[2]} tokens, n = %{customdata[3]}<extra></extra>",
            )
    figure.update_layout(barmode="stack", bargap=0.35)
    return figure


def _arms(frame: pl.DataFrame) -> list[str]:
    arms = list(dict.fromkeys(frame["arm"]))
    return sorted(arms, key=lambda arm: {GENERATE: 0, "dense": 1}.get(arm, 2))


def caption(frame: pl.DataFrame) -> str:
    """How long dense decode takes, and what selection costs at most beside it."""
    decode = {row["arm"]: row for row in frame.filter(pl.col("phase") == "decode").iter_rows(named=True)}
    select = frame.filter(pl.col("phase") == "select").sort("ms")
    dense = decode.get("dense")
    text = f"Dense decode of {dense['tokens']:.0f} tokens takes {milliseconds(dense['ms'])}." if dense else ""
    if select.height:
        row = select.row(-1, named=True)
        share = f" ({percent(row['ms'] / dense['ms'], 0)} of that)" if dense and dense["ms"] else ""
        text += f" Selection costs {milliseconds(row['ms'])} at most, for {row['arm']}{share}."
    most = frame["n"].max()
    return f"{text} n = {most} repetitions an arm at most; hover shows quartiles.".strip()
