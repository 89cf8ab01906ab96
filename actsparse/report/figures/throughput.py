"""Throughput runs: time a token and speed-up against batch size, prompt and generated length."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, look_of
from actsparse.report.figures.columns import as_float
from actsparse.report.figures.marks import add_line, log2_axis
from actsparse.report.looks import Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.wording import count, exact, number, times

AXES = {
    "batch_size": "sequences in the batch (log)",
    "prompt_length": "prompt length (tokens, log)",
    "gen_length": "generated length (tokens, log)",
}
KEYS = ["batch_size", "prompt_length", "gen_length"]


def by_batch(panel: EvalPanel) -> pl.DataFrame:
    return _along(panel, "batch_size")


def by_length(panel: EvalPanel) -> pl.DataFrame:
    """Along the generated length, or the prompt's where only that was varied."""
    frame = _along(panel, "gen_length")
    return frame if not frame.is_empty() else _along(panel, "prompt_length")


def _along(panel: EvalPanel, axis: str) -> pl.DataFrame:
    """`plan, axis, x, batch_size, prompt_length, gen_length, ms, dense_ms, speedup, n`: median time of a decode step.

    The other two sizes are held at their smallest; empty where the axis was not varied.
    """
    rows = panel.throughput.filter((pl.col("metric") == "ms_p50") & pl.col("value").is_finite())
    for other in KEYS:
        if other != axis and rows.height:
            rows = rows.filter(pl.col(other) == rows[other].min())
    dense = rows.filter(pl.col("plan") == Role.DENSE).select(*KEYS, dense_ms="value")
    frame = rows.join(dense, on=KEYS, how="left", maintain_order="left")
    frame = frame.select(
        "plan", *KEYS, "n", "dense_ms", ms="value", axis=pl.lit(axis), x=pl.col(axis),
        speedup=pl.col("dense_ms") / pl.col("value"),
    ).sort("plan", "x", maintain_order=True)  # fmt: skip
    return frame if frame["x"].n_unique() > 1 else frame.clear()


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    sparse = frame.filter((pl.col("plan") != Role.DENSE) & pl.col("speedup").is_not_null())
    compared = sparse.height > 0
    figure = canvas(
        x=AXES[frame["axis"][0]],
        y="decode speed-up over dense (×)" if compared else "time a decode step (ms, median)",
        height=360,
        x_axis=log2_axis(),
        y_axis={"tickformat": ".2f" if compared else "~g"},
    )
    shown = sparse if compared else frame
    for plan in dict.fromkeys(shown["plan"]):
        look = look_of(looks, plan)
        hover = "%{x}: %{y:.2f}×" if compared else "%{x}: %{y:.2f} ms"
        add_line(
            figure, shown.filter(pl.col("plan") == plan), x="x", y="speedup" if compared else "ms", name=plan,
            colour=look.colour, dash=look.dash, symbol=look.symbol, hover=hover,
        )  # fmt: skip
    if compared:
        add_reference(figure, y=1.0, text="dense", at="start")
    return figure


def caption(frame: pl.DataFrame) -> str:
    """Where each plan stops paying along the axis, and what was held fixed."""
    axis = frame["axis"][0]
    name = {"batch_size": "batch", "prompt_length": "prompts of", "gen_length": "generations of"}[axis]
    sparse = frame.filter((pl.col("plan") != Role.DENSE) & pl.col("speedup").is_not_null())
    fixed = ", ".join(
        f"{label} {exact(as_float(frame[key][0]))}"
        for key, label in (("batch_size", "batch"), ("prompt_length", "prompt"), ("gen_length", "generated"))
        if key != axis
    )
    if sparse.is_empty():
        low, high = frame.sort("ms").row(0, named=True), frame.sort("ms").row(-1, named=True)
        said = f"A step takes {number(low['ms'])} to {number(high['ms'])} ms"
    else:
        best = sparse.sort("speedup").row(-1, named=True)
        said = f"The largest gain is {times(best['speedup'])}, {best['plan']} at {name} {exact(best['x'])}"
        losing = sparse.filter(pl.col("speedup") < 1).sort("x")
        if losing.height:
            row = losing.row(0, named=True)
            said += (
                f"; {row['plan']} is slower than dense from {exact(row['x'])} on"
                if _from_there(sparse, row)
                else (f"; {losing['plan'].n_unique()} plans are slower than dense somewhere")
            )
        else:
            said += "; no plan is slower than dense anywhere"
    n = frame["n"].max()
    return f"{said}. Held fixed: {fixed}." + (f" n = {count(n)} steps a point." if isinstance(n, int) and n else "")


def _from_there(sparse: pl.DataFrame, row: dict[str, Any]) -> bool:
    """Whether a plan stays slower from that place on, and no other plan is ever slower."""
    later = sparse.filter((pl.col("plan") == row["plan"]) & (pl.col("x") >= row["x"]))
    others = sparse.filter((pl.col("plan") != row["plan"]) & (pl.col("speedup") < 1))
    return bool((later["speedup"] < 1).all()) and others.is_empty()
