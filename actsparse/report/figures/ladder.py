"""The input ladder: overlaps of masks on natural to random input, beside what chance gives, and SI2's excess J."""

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, plain, set_variants
from actsparse.report.figures.columns import as_float, counted, first_known, measured
from actsparse.report.figures.marks import ends
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import between, number, percent

RUNGS = ("natural", "sentence-shuffled", "token-shuffled", "unigram-random", "uniform-random", "repeat")
SERIES = {
    "overlap_neighbour": ("neighbouring tokens", DEPTH[0], "circle"),
    "overlap_w": ("same sequence, 8 or more apart", INK, "square"),
    "overlap_b": ("other sequence", DEPTH[4], "diamond"),
}
# The kinds of pairs by their overlap; "" is the mean of all pairs of a rung's tokens.
PAIRS = {"overlap_neighbour": "neighbour", "overlap_w": "within", "overlap_b": "between"}
ALL_PAIRS, NO_PAIRS = "", "none"
# Kinds of pairs have chance levels of their own (experts, masks of several sizes) that are drawn where they part.
PARTED = 0.02
CHANCE = {
    "e_uniform": ("uniform chance", "dot"),
    "nat": ("popularity, natural", "dash"),
    "own": ("popularity, own", "dashdot"),
}
POPS = {"": "above uniform chance", "nat": "above popularity (natural)", "own": "above popularity (own input)"}


def overlaps(panel: ProfilePanel) -> pl.DataFrame:
    """`metric, pairs, r, rung, value, low, high, n`: raw overlaps and chance levels, mean of layers, by rung.

    `pairs` names the pairs of a chance level: `neighbour`, `within`, `between`, or "" for all of the rung's tokens.
    """
    parts = [_of(panel, metric).with_columns(metric=pl.lit(metric)) for metric in (*SERIES, "e_uniform")]
    chance = _of(panel, "e_pop").with_columns(metric=pl.col("pop"))
    frame = pl.concat([*parts, chance]).drop_nulls("metric").with_columns(pl.col("pairs").fill_null(ALL_PAIRS))
    frame = frame.filter(pl.col("pairs").is_in([ALL_PAIRS, *PAIRS.values()]))
    found = frame.select("metric", "pairs", "r", "rung", "value", "low", "high", "n")
    return found if set(SERIES) & set(found["metric"]) else found.clear()


def excess(panel: ProfilePanel) -> pl.DataFrame:
    """`r, pop, rung, value, low, high, n, sir, sir_low, sir_high`: J = within less between, by rung."""
    ratio = measured(panel.measures, "sir", numbers=("r",), texts=("pop",)).filter(pl.col("layer").is_null())
    ratio = ratio.select("r", pl.col("pop").fill_null(""), sir="value", sir_low="low", sir_high="high")
    frame = _of(panel, "si2_j").with_columns(pl.col("pop").fill_null(""))
    return frame.join(ratio, on=["r", "pop"], how="left", maintain_order="left")


def _of(panel: ProfilePanel, metric: str) -> pl.DataFrame:
    frame = measured(panel.measures, metric, numbers=("r",), texts=("pop", "rung", "pairs"))
    order = pl.col("rung").replace_strict({rung: place for place, rung in enumerate(RUNGS)}, default=len(RUNGS))
    return frame.filter(pl.col("layer").is_null()).drop("layer").drop_nulls(["r", "rung"]).sort("r", order)


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the ladder; chance levels have no symbol."""

    metric: str
    pairs: str
    name: str
    colour: str
    symbol: str = ""
    dash: str = "solid"
    legend: bool = True


def _lines(frame: pl.DataFrame) -> list[_Line]:
    """The overlaps, and the chance levels: in grey, or where they part those of each kind of pair in its colour."""
    lines = [_Line(metric, ALL_PAIRS, *look) for metric, look in SERIES.items()]
    if not _parted(frame):
        return lines + [_Line(metric, ALL_PAIRS, name, MUTED, dash=dash) for metric, (name, dash) in CHANCE.items()]
    for metric, (name, dash) in CHANCE.items():
        # one entry of the legend for all three, without values of its own
        lines.append(_Line(metric, NO_PAIRS, f"{name}, of each kind", MUTED, dash=dash))
        for overlap, pairs in PAIRS.items():
            lines.append(_Line(metric, pairs, name, SERIES[overlap][1], dash=dash, legend=False))
    return lines


def _parted(frame: pl.DataFrame) -> bool:
    """Whether kinds of pairs differ in their chance level."""
    levels = frame.filter(pl.col("metric").is_in(list(CHANCE)) & (pl.col("pairs") != ALL_PAIRS))
    spread = levels.group_by("metric", "r", "rung", maintain_order=True).agg(
        share=(pl.col("value").max() - pl.col("value").min()) / pl.col("value").max()
    )
    return bool((spread["share"] > PARTED).any())


def draw_overlaps(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """One line a kind of pair over the rungs that have pairs; dotted and dashed lines are the chance levels."""
    paired = set(frame.filter(pl.col("metric").is_in(list(SERIES)))["rung"])
    rungs = [rung for rung in RUNGS if rung in paired]
    title = "overlap of two masks (share of the kept neurons)"
    figure = canvas(
        x="input, from natural text to one repeated token",
        y=title,
        height=400,
        x_axis=_rung_axis(rungs),
        y_axis={"rangemode": "tozero", "tickformat": ".2f"},
    )
    densities = frame["r"].unique().sort().to_list()
    values: dict[float, list[list[float | None]]] = {density: [] for density in densities}
    bars: dict[float, list[dict[str, Any] | None]] = {density: [] for density in densities}
    for line in _lines(frame):
        for density in densities:
            middle, low, high = (_by_rung(frame, line, density, end, rungs) for end in ("value", "low", "high"))
            values[density].append(middle)
            bars[density].append(ends(middle, low, high, line.colour))
        first = densities[0]
        figure.add_scatter(
            x=rungs,
            y=floats(values[first][-1]),
            error_y=bars[first][-1],
            mode="lines+markers" if line.symbol else "lines",
            name=line.name,
            legendgroup=line.metric,
            showlegend=line.legend,
            line={"color": line.colour, "width": 2 if line.symbol else 1.2, "dash": line.dash},
            marker={"size": 8, "color": line.colour, "symbol": line.symbol or "circle"},
            hovertemplate=f"%{{x}}: %{{y:.3f}}<extra>{line.name}{', ' * bool(line.pairs)}{line.pairs}</extra>",
        )
    if len(densities) > 1:
        choices = [
            {
                "label": percent(density, 0),
                "axis": "y",
                "title": title,
                "values": values[density],
                "errors": bars[density],
            }
            for density in densities
        ]
        set_variants(figure, name="neurons kept", variants=choices)
    return figure


def _rung_axis(rungs: list[str]) -> dict[str, Any]:
    """The rungs in order, their names on two lines."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rungs,
        "showgrid": False,
        "tickvals": rungs,
        "tickangle": 0,
        "tickfont": {"size": 11},
        "ticktext": [rung.replace("-", "-<br>") for rung in rungs],
    }


def _by_rung(frame: pl.DataFrame, line: _Line, density: float, column: str, rungs: list[str]) -> list[float | None]:
    wanted = (pl.col("metric") == line.metric) & (pl.col("pairs") == line.pairs) & (pl.col("r") == density)
    found = dict(frame.filter(wanted).select("rung", column).iter_rows())
    return [found.get(rung) for rung in rungs]


def draw_excess(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="input, from natural text to random tokens",
        y="J: overlap within less between sequences (kappa)",
        x_axis=_rung_axis([rung for rung in RUNGS if rung in set(frame["rung"])]),
        y_axis={"tickformat": ".3f", "zeroline": True, "zerolinecolor": MUTED, "zerolinewidth": 1},
    )
    density = frame["r"].min()
    for (pop, name), colour, symbol in zip(
        POPS.items(), (DEPTH[4], DEPTH[0], INK), ("circle", "square", "diamond"), strict=True
    ):
        rows = frame.filter((pl.col("pop") == pop) & (pl.col("r") == density))
        if rows.height:
            figure.add_scatter(
                x=[plain(rung) for rung in rows["rung"]],
                y=floats(rows["value"]),
                error_y=ends(rows["value"], rows["low"], rows["high"], colour),
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 1.8},
                marker={"size": 8, "color": colour, "symbol": symbol},
                hovertemplate=f"%{{x}}: J = %{{y:.4f}}<extra>{name}</extra>",
            )
    return figure


def caption_overlaps(frame: pl.DataFrame) -> str:
    """What of the overlap within natural text chance and a static hot set explain."""
    density = frame["r"].min()
    natural = frame.filter((pl.col("rung") == "natural") & (pl.col("r") == density))
    # the chance level of the pairs within a sequence, where it was measured, stands after that of all pairs
    of_pairs = natural.filter(pl.col("pairs").is_in([ALL_PAIRS, "within"])).sort("pairs")
    value = dict(of_pairs.select("metric", "value").iter_rows())
    within, between_, uniform = value.get("overlap_w"), value.get("overlap_b"), value.get("e_uniform")
    own = value.get("own", value.get("nat"))
    if within is None or uniform is None:
        return f"Overlaps were measured, but none within natural text.{counted(frame, 'sequences')}"
    text = (
        f"Two tokens of one natural text share {number(within)} of the neurons kept at {percent(as_float(density), 0)}"
    )
    text += f"; chance gives {number(uniform)}"
    if own is not None and within > uniform:
        text += f", a static hot set {number(own)}: it explains {_explained(within, uniform, own)} of the excess"
    text += f". Tokens of different texts share {number(between_)}" if between_ is not None else ""
    random = frame.filter(
        (pl.col("rung") == "uniform-random") & (pl.col("r") == density) & (pl.col("metric") == "overlap_w")
    )
    known = first_known(random["value"])
    text += f", random tokens within one sequence {number(known)}" if known is not None else ""
    return f"{text}.{counted(frame, 'sequences a rung')}"


def _explained(within: float, uniform: float, own: float) -> str:
    share = (own - uniform) / (within - uniform)
    return "all" if share >= 0.995 else "nothing" if share <= 0.005 else f"{100 * share:.0f}\u202f%"


def caption_excess(frame: pl.DataFrame) -> str:
    """J of natural text above the static hot set, with its interval, and the ratio SIR."""
    rows = frame.filter((pl.col("r") == frame["r"].min()) & (pl.col("pop") == "nat"))
    natural = rows.filter(pl.col("rung") == "natural")
    count = counted(frame, "sequences a rung")
    if natural.is_empty():
        return f"J was not measured on natural text.{count}"
    row = natural.row(0, named=True)
    interval = between(row["low"], row["high"], 4)
    text = f"Above popularity, J of natural text is {number(row['value'], 2)}" + (f" ({interval})" if interval else "")
    if not _sure(row["low"], row["high"]):
        nothing = "a text's masks hold together no more than those of different texts, so there is nothing to split"
        return f"{text}: {nothing}.{count}"
    if row["sir"] is None:
        return f"{text}; SIR is not defined here.{count}"
    span = between(row["sir_low"], row["sir_high"])
    span = f" ({span})" if span else ""
    return f"{text}; SIR = {number(row['sir'], 2)}{span}: inertia {_kind(row['sir'])}.{count}"


def _sure(low: float | None, high: float | None) -> bool:
    """Whether an interval leaves out 0."""
    return low is not None and high is not None and (low > 0 or high < 0)


def _kind(ratio: float) -> str:
    if ratio >= 0.75:
        return "needs no meaning"
    return "is mostly semantic" if ratio <= 0.25 else "is partly semantic"
