"""An empty figure in the report's manner, and the few things that every figure sets the same way."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.looks import GOOD, INK, MUTED, PAPER, RULE, SHARE_SCALE, Looks, PlanLook
from actsparse.report.plans import parse_plan
from actsparse.report.wording import one_line

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
LONGEST, LONGEST_TITLE = 40, 120
BASELINES, METHODS = 4, 12
_AXIS = {
    "gridcolor": RULE,
    "linecolor": MUTED,
    "tickcolor": MUTED,
    "zeroline": False,
    "showline": True,
    "ticks": "outside",
    "ticklen": 4,
    "ticklabeloverflow": "allow",
    "title": {"standoff": 10, "font": {"size": 13}},
}
_TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12.5, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "colorway": [INK],
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK, "size": 12.5}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "margin": {"l": 66, "r": 18, "t": 18, "b": 50},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
    }
)


def canvas(
    *, x: str, y: str, height: int = 340, x_axis: dict[str, Any] | None = None, y_axis: dict[str, Any] | None = None
) -> go.Figure:
    """An empty figure with its axis titles; `x_axis` and `y_axis` add to the axes."""
    return go.Figure(
        layout={
            "template": _TEMPLATE,
            "height": height,
            "xaxis": {"title": {"text": x}, **(x_axis or {})},
            "yaxis": {"title": {"text": y}, **(y_axis or {})},
        }
    )


def plain(text: object) -> str:
    """Text from outside for a figure, where plotly would read tags and entities; long names lose their middle."""
    line = one_line(str(text))
    if len(line) > LONGEST:
        line = f"{line[:14]}…{line[15 - LONGEST :]}"
    return _escaped(line)


def titled(text: str) -> str:
    """An axis title from outside, whole; the page breaks it into lines."""
    return _escaped(one_line(text)[:LONGEST_TITLE])


def _escaped(line: str) -> str:
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("%{", "%\u200b{").replace("$", "\uff04")


def floats(values: Iterable[float | None]) -> np.ndarray:
    """Values as a typed array (8 times smaller in the page than digits); None becomes a gap."""
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan).astype(np.float32)


def integers(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def shares_scale() -> list[list[Any]]:
    """The sequential colour scale of shares: paper to deep blue."""
    return [[place / (len(SHARE_SCALE) - 1), colour] for place, colour in enumerate(SHARE_SCALE)]


def look_of(looks: Looks, plan: str) -> PlanLook:
    """The look of a plan; ink for one that the report does not know."""
    return looks.get(plan) or PlanLook(colour=INK, dash="solid", symbol="circle", baseline=False)


def colour_bar(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "side": "right"},
        "thickness": 10,
        "outlinewidth": 0,
        "len": 1.0,
        "tickfont": {"size": 11},
        **more,
    }


def layer_axis(frame: pl.DataFrame) -> dict[str, Any]:
    """An axis of whole layers."""
    count = frame["layer"].n_unique()
    return {"tick0": 0, "dtick": next((step for step in (1, 2, 5, 10) if count <= 10 * step), 20)}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high` with ticks at 1, 2, 5, or evenly where it spans little."""
    if high / low < 4:
        ticks = _even_ticks(low, high)
    else:
        steps = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 5, 7)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
    texts = [f"{tick:g}" if tick < 1e5 else f"10<sup>{math.log10(tick):.0f}</sup>" for tick in ticks]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks, "ticktext": texts}


def _even_ticks(low: float, high: float) -> list[float]:
    """Four to eight round values between `low` and `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * power for step in (1, 2, 5, 10) if (high - low) / (step * power) <= 8)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(place * step, 10) for place in range(first, last + 1)]


def add_reference(
    figure: go.Figure, *, x: float | None = None, y: float | None = None, text: str = "", at: str = "end"
) -> None:
    """A thin line across the figure at `x` or `y` with a small label at its `start` or `end`."""
    line = {"color": MUTED, "width": 1}
    label = {"text": text, "font": {"size": 11, "color": MUTED}, "textposition": at, "padding": 2} if text else None
    if x is not None:
        figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line=line, layer="below")
    if y is not None:
        figure.add_shape(type="line", y0=y, y1=y, x0=0, x1=1, xref="paper", line=line, layer="below", label=label)


def add_usable_band(figure: go.Figure, dense: float, share: float) -> None:
    """Shade the perplexities from that of dense to `share` over it."""
    figure.add_shape(
        type="rect",
        x0=0,
        x1=1,
        xref="paper",
        y0=dense,
        y1=dense * (1 + share),
        fillcolor=GOOD,
        opacity=0.16,
        line_width=0,
        layer="below",
    )


def set_variants(figure: go.Figure, *, name: str, variants: Sequence[dict[str, Any]]) -> None:
    """Offer the reader other `x` or `y` values of the same traces; the page makes a menu of it.

    A variant holds `label`, `axis` (`x`, `y` or `z`), `title` (empty: unchanged), `values`, one list a trace, and
    `errors`, error bars a trace where they change too.
    """
    figure.update_layout(meta={"variants": {"name": name, "choices": list(variants)}})


def without_crowd(frame: pl.DataFrame, looks: Looks) -> list[str]:
    """The plans of a frame that are drawn as lines, in the report's order: of the baselines only the largest four, and
    of more than twelve methods' plans the middle one of each series."""
    present = set(frame["plan"])
    plans = [plan for plan in looks if plan in present] + sorted(present - set(looks))
    baselines = [plan for plan in plans if look_of(looks, plan).baseline]
    largest = sorted(baselines, key=lambda plan: -(parse_plan(plan).amount or 0.0))[:BASELINES]
    methods = [plan for plan in plans if plan not in baselines]
    if len(methods) > METHODS:
        methods = _middle_of_each(methods)[:METHODS]
    return [plan for plan in plans if plan in methods or plan in largest]


def _middle_of_each(plans: list[str]) -> list[str]:
    """Of each series the plan with the middle amount, in order of the series."""
    series: dict[str, list[str]] = {}
    for plan in plans:
        series.setdefault(parse_plan(plan.split(" (")[0]).series, []).append(plan)
    ordered = [
        sorted(group, key=lambda plan: parse_plan(plan.split(" (")[0]).amount or 0.0) for group in series.values()
    ]
    return [group[(len(group) - 1) // 2] for group in ordered]


def spread(places: Sequence[int], count: int = 5) -> list[int]:
    """At most `count` of the places, first and last included, evenly spread."""
    ordered = sorted(set(places))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(step * (len(ordered) - 1) / (count - 1))] for step in range(count)]
