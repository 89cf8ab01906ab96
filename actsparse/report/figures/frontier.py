"""Quality against speed with every plan: what can be had at once."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, add_usable_band, canvas, floats, log_axis, look_of, plain
from actsparse.report.figures.columns import as_float, first_known
from actsparse.report.figures.labels import Box, Mark, place_labels
from actsparse.report.looks import MUTED, Looks
from actsparse.report.outcomes import Outcome
from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.verdicts import USABLE
from actsparse.report.wording import between, listed, number, percent, times

CAP = 10.0
NAMED, LISTED = 14, 6
WIDTH, HEIGHT = 860, 330
COLUMNS = {
    "plan": pl.String,
    "role": pl.String,
    "speedup": pl.Float64,
    "speedup_low": pl.Float64,
    "speedup_high": pl.Float64,
    "ceiling": pl.Float64,
    "timed": pl.Boolean,
    "ppl": pl.Float64,
    "ppl_low": pl.Float64,
    "ppl_high": pl.Float64,
    "dense_ppl": pl.Float64,
    "best": pl.Boolean,
}


def data(panel: EvalPanel) -> pl.DataFrame:
    """One row a plan; plans without a timing stand at their byte ceiling with `timed` false."""
    rows = [_row(outcome) for outcome in panel.outcomes]
    frame = pl.DataFrame(rows, schema={name: kind for name, kind in COLUMNS.items() if name != "best"}, orient="row")
    frame = frame.filter(pl.col("ppl").is_not_null() & pl.col("speedup").is_not_null())
    return frame.with_columns(best=pl.Series(_pareto(frame), dtype=pl.Boolean))


def _row(outcome: Outcome) -> tuple[object, ...]:
    dense = outcome.name.role is Role.DENSE
    timed = dense or outcome.speedup.value is not None
    speed = 1.0 if dense else outcome.speedup.value if timed else outcome.reach
    low, high = (outcome.speedup.low, outcome.speedup.high) if timed else (None, None)
    ppl = outcome.ppl
    return (
        *(outcome.label, outcome.name.role.value, speed, low, high, outcome.reach, timed),
        *(ppl.value, ppl.low, ppl.high, outcome.dense_ppl.value),
    )


def _pareto(frame: pl.DataFrame) -> list[bool]:
    """Whether no timed plan is both faster and better."""
    rows = frame.select("speedup", "ppl", "timed").rows()
    timed = [(speed, ppl) for speed, ppl, known in rows if known]
    return [
        known and not any(s >= speed and p <= ppl and (s, p) != (speed, ppl) for s, p in timed)
        for speed, ppl, known in rows
    ]


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    dense = _dense(frame)
    top = _top(frame, dense)
    low_x, high_x = _x_range(frame)
    low_y, high_y = math.log10(dense * 0.93), math.log10(top * 1.12)
    figure = canvas(
        x="decode speed-up over dense (×)",
        y="perplexity (log)",
        height=HEIGHT + 90,
        x_axis={"range": [low_x, high_x], "tickformat": ".2f"},
        y_axis=log_axis(10**low_y, 10**high_y),
    )
    add_usable_band(figure, dense, USABLE)
    add_reference(figure, x=1.0)
    best = frame.filter("best").sort("speedup")
    figure.add_scatter(
        x=floats(best["speedup"]),
        y=floats(best["ppl"].clip(upper_bound=top)),
        mode="lines",
        line={"color": MUTED, "width": 1, "dash": "dot", "shape": "vh"},
        hoverinfo="skip",
        showlegend=False,
    )

    def pixel(x: float, ppl: float) -> tuple[float, float]:
        return (x - low_x) / (high_x - low_x) * WIDTH, (high_y - math.log10(min(ppl, top))) / (high_y - low_y) * HEIGHT

    named = _named(frame)
    marks = [_mark(row, top, pixel) for row in frame.iter_rows(named=True)]
    steps = _steps([pixel(speed, ppl) for speed, ppl in best.select("speedup", "ppl").iter_rows()])
    places = place_labels(marks, width=WIDTH, height=HEIGHT, lines=steps)
    for row, place in zip(frame.iter_rows(named=True), places, strict=True):
        _point(figure, row, place, top, looks, named=row["plan"] in named)
    figure.update_layout(showlegend=False, meta={"named": True})
    return figure


def _named(frame: pl.DataFrame) -> set[str]:
    """The plans whose names stand beside their points: timed ones and methods, of too many only those that no other
    plan beats at both ends, timed or not."""
    wanted = frame.filter(pl.col("timed") | (pl.col("role") == Role.METHOD))
    if wanted.height <= NAMED:
        return set(wanted["plan"])
    points = wanted.select("plan", "speedup", "ppl").rows()
    best = [
        (ppl, plan) for plan, speed, ppl in points
        if not any(s >= speed and p <= ppl and (s, p) != (speed, ppl) for _, s, p in points)
    ]  # fmt: skip
    return {plan for _, plan in sorted(best)[:NAMED]} | set(frame.filter(pl.col("role") == Role.DENSE)["plan"])


def _point(figure: go.Figure, row: dict[str, Any], place: str, top: float, looks: Looks, *, named: bool) -> None:
    plan, ppl = str(row["plan"]), float(str(row["ppl"]))
    look, beyond = look_of(looks, plan), ppl > top
    symbol = "triangle-up" if beyond else look.symbol if row["timed"] else look.opened().symbol
    interval = between(row["speedup_low"], row["speedup_high"]) if row["timed"] else "not timed: at its byte ceiling"
    figure.add_scatter(
        x=floats([row["speedup"]]),
        y=floats([min(ppl, top)]),
        error_x=_error(row, "speedup", look.colour) if row["timed"] else None,
        error_y=_error(row, "ppl", look.colour) if not beyond else None,
        mode="markers+text" if named else "markers",
        showlegend=named,
        name=plain(plan),
        text=[plain(plan) + (f" ({number(ppl, 2)})" if beyond else "")],
        textposition=place,
        textfont={"size": 12, "color": MUTED if look.baseline else look.colour},
        marker={
            "size": 10 if named else 7,
            "color": look.colour,
            "symbol": symbol,
            "line": {"width": 1.5, "color": look.colour},
        },
        hovertemplate=f"{plain(plan)}<br>%{{x:.2f}}× {interval}<br>perplexity {number(ppl)}<extra></extra>",
        cliponaxis=False,
    )


def _mark(row: dict[str, Any], top: float, pixel: Callable[[float, float], tuple[float, float]]) -> Mark:
    """A point with its bars in pixels of the nominal frame."""
    x, y = pixel(row["speedup"], row["ppl"])
    left, right = (pixel(row[end] or row["speedup"], row["ppl"])[0] for end in ("speedup_low", "speedup_high"))
    low, high = (pixel(row["speedup"], row[end] or row["ppl"])[1] for end in ("ppl_low", "ppl_high"))
    return Mark(x, y, plain(row["plan"]) + (" (20 000)" if row["ppl"] > top else ""), left, right, high, low)


def _steps(corners: list[tuple[float, float]]) -> list[Box]:
    """The stepped line through the corners, as thin boxes."""
    boxes = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        boxes += [Box(x - 1, min(y, next_y), x + 1, max(y, next_y)), Box(x, next_y - 1, next_x, next_y + 1)]
    return boxes


def _error(row: dict[str, Any], name: str, colour: str) -> dict[str, object] | None:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if not (isinstance(value, float) and isinstance(low, float) and isinstance(high, float)):
        return None
    return {
        "type": "data", "symmetric": False, "array": floats([high - value]), "arrayminus": floats([value - low]),
        "thickness": 1, "width": 0, "color": colour,
    }  # fmt: skip


def _dense(frame: pl.DataFrame) -> float:
    """The dense perplexity, else the best one."""
    return first_known(frame["dense_ppl"]) or as_float(frame["ppl"].min())


def _top(frame: pl.DataFrame, dense: float) -> float:
    """The top of the perplexity axis: all plans that stay within ten times dense; the rest sit on the edge."""
    near = frame.filter(pl.col("ppl") <= CAP * dense)["ppl"].max()
    return max(1.25 * (near if isinstance(near, float) else dense), 1.2 * dense)


def _x_range(frame: pl.DataFrame) -> tuple[float, float]:
    ends = [
        value for column in ("speedup", "speedup_low", "speedup_high") for value in frame[column].drop_nulls().to_list()
    ]
    low, high = min([1.0, *ends]), max([1.05, *ends])
    return low - 0.06 * (high - low) - 0.01, high + 0.12 * (high - low)


def _some(plans: list[str]) -> str:
    """The plans, of many the first and how many more."""
    if len(plans) <= LISTED + 1:
        return listed(plans)
    return listed([*plans[:LISTED], f"{len(plans) - LISTED} more"])


def caption(frame: pl.DataFrame) -> str:
    """The plans that nothing else beats at both ends, and which lie within the usable band."""
    best = frame.filter(pl.col("best") & (pl.col("role") != Role.DENSE)).sort("speedup")
    named = listed(
        [f"{row['plan']} ({times(row['speedup'])}, {number(row['ppl'])})" for row in best.iter_rows(named=True)]
    )
    text = (
        f"No timed plan is both faster and better than {named}."
        if best.height
        else "No timed plan is on the frontier but dense."
    )
    timed = frame.filter(pl.col("timed") & (pl.col("role") != Role.DENSE))
    usable = timed.filter(pl.col("ppl") <= pl.col("dense_ppl") * (1 + USABLE)).sort("speedup")
    band = f"{percent(USABLE, 0)} of dense (green band)"
    text += (
        f" Within {band}: {listed(usable['plan'].to_list())}."
        if usable.height
        else f" No timed plan stays within {band}."
    )
    beyond = frame.filter(pl.col("ppl") > _top(frame, _dense(frame)))
    if beyond.height:
        text += f" Beyond the axis: {_some(beyond['plan'].to_list())}."
    waiting = frame.filter(~pl.col("timed"))["plan"].to_list()
    text += f" Hollow, not timed, at the byte ceiling: {_some(waiting)}." if waiting else ""
    return f"{text} n = {frame.height - 1} plans beside dense."
