"""HU1: the same token after different histories, beside its controls; and HU2, what the token id leaves open."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import add_reference, canvas, layer_axis, set_variants
from actsparse.report.figures.columns import as_float, counted, first_known, measured
from actsparse.report.figures.marks import add_dots, add_line, ends, label_axis
from actsparse.report.looks import DEPTH, INK, MUTED, Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import between, number, percent

CONTROLS = {
    "identical": "same context twice (must be 0)",
    "": "same token, different history",
    "shuffled": "its own history, shuffled",
    "random": "random tokens as history",
    "none": "no history",
    "other-token": "different token, same history",
}
POPS = {"": ("uniform chance", DEPTH[0], "circle"), "nat": ("popularity", DEPTH[4], "diamond")}
LINES = {
    "": (DEPTH[0], "same token, other history"),
    "shuffled": (DEPTH[4], "its history shuffled"),
    "other-token": (MUTED, "other token, same history"),
}


def controls(panel: ProfilePanel) -> pl.DataFrame:
    """`control, pop, r, value, low, high, n, share, share_low, share_high`: HU1 and its controls, mean of layers."""
    frame = measured(panel.measures, "hu1", numbers=("r",), texts=("control", "pop"))
    frame = frame.filter(pl.col("layer").is_null()).with_columns(pl.col("control", "pop").fill_null(""))
    order = pl.col("control").replace_strict({name: place for place, name in enumerate(CONTROLS)}, default=99)
    share = measured(panel.measures, "history_share", numbers=("r",)).filter(pl.col("layer").is_null())
    share = share.select("r", share="value", share_low="low", share_high="high")
    found = frame.filter(pl.col("control").is_in(list(CONTROLS))).sort("r", "pop", order).drop("layer")
    return found.join(share, on="r", how="left", maintain_order="left")


def draw_controls(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """A dot a control with its interval, above uniform chance and above popularity, at the lowest density."""
    rows = frame.filter(pl.col("r") == frame["r"].min())
    rows = rows.with_columns(name=pl.col("control").replace_strict(CONTROLS))
    figure = canvas(
        x=f"1 − kappa (0: same mask, 1: chance; {_density(frame)} kept)",
        y="",
        height=150 + 30 * rows["control"].n_unique(),
        x_axis={"range": [-0.03, 1.05 * _largest(rows)], "tickformat": ".1f"},
        y_axis=label_axis(),
    )
    for pop, (name, colour, symbol) in POPS.items():
        part = rows.filter(pl.col("pop") == pop)
        if part.height:
            add_dots(
                figure, part, labels="name", value="value", name=f"against {name}", colour=colour, hover="%{x:.3f}",
                symbol=symbol,
            )  # fmt: skip
    add_reference(figure, x=1.0)
    return figure


def _largest(frame: pl.DataFrame) -> float:
    """The largest value or end of an interval; 1, where chance is, at least."""
    return max(1.0, as_float(frame.select(pl.max_horizontal("value", "high").max()).item()))


def _density(frame: pl.DataFrame) -> str:
    return f"{as_float(frame['r'].min()):.0%}"


def caption_controls(frame: pl.DataFrame) -> str:
    """HU1 against popularity with its interval, what another token does, and the history's share."""
    rows = frame.filter((pl.col("r") == frame["r"].min()) & (pl.col("pop") == "nat"))
    rows = rows if rows.height else frame.filter(pl.col("r") == frame["r"].min())
    found = {row["control"]: row for row in rows.iter_rows(named=True)}
    count = counted(frame, "contexts")
    if "" not in found:
        return f"Only controls of HU1 were measured.{count}"
    row = found[""]
    span = between(row["low"], row["high"])
    text = f"The same token after two histories: HU1 = {number(row['value'], 2)}" + (f" ({span})" if span else "")
    if other := found.get("other-token"):
        text += f"; another token after the same history: {number(other['value'], 2)}"
    share = first_known(rows["share"])
    if share is not None:
        span = between(100 * as_float(row["share_low"]), 100 * as_float(row["share_high"]), 0)
        who = "the token decides most" if share < 0.4 else "the history decides most" if share > 0.6 else "both decide"
        text += f". The history's share of what is specific in a mask is {percent(share, 0)}"
        text += f" ({span})" if span else ""
        text += f": {who}"
    identical = found.get("identical")
    if identical is not None and abs(identical["value"]) > 1e-6:
        text += f". The identical context gives {number(identical['value'], 2)} instead of 0: a fault"
    return f"{text}.{count}"


def by_layer(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, control, pop, r, value, low, high, n`: HU1 and two controls by layer, above both chance levels."""
    frame = measured(panel.measures, "hu1", numbers=("r",), texts=("control", "pop"))
    frame = frame.with_columns(pl.col("control", "pop").fill_null("")).filter(pl.col("layer").is_not_null())
    found = frame.filter(pl.col("control").is_in(list(LINES)) & pl.col("pop").is_in(list(POPS)))
    order = pl.col("control").replace_strict({name: place for place, name in enumerate(LINES)}, default=99)
    return found.sort("r", order, "pop", "layer").select("layer", "control", "pop", "r", "value", "low", "high", "n")


def draw_by_layer(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """A line a control (its colour) and chance level (its dash), with intervals; the menu changes the density."""
    figure = canvas(
        x="layer",
        y="1 − kappa (0: same mask, 1: chance)",
        height=400,
        x_axis=layer_axis(frame),
        y_axis={"tickformat": ".1f", "range": [0, 1.1 * _largest(frame)]},
    )
    densities = frame["r"].unique().sort().to_list()
    layers = frame["layer"].unique().sort()
    values: dict[float, list[list[float | None]]] = {density: [] for density in densities}
    bars: dict[float, list[dict[str, Any] | None]] = {density: [] for density in densities}
    for control, (colour, name) in LINES.items():
        for pop, symbol, chance in (("", "circle", "uniform"), ("nat", "diamond", "popularity")):
            lines = frame.filter((pl.col("control") == control) & (pl.col("pop") == pop))
            if lines.is_empty():
                continue
            by_density = {density: _on(lines, density, layers) for density in densities}
            for density, rows in by_density.items():
                values[density].append(rows["value"].to_list())
                bars[density].append(ends(rows["value"], rows["low"], rows["high"], colour))
            add_line(
                figure, by_density[densities[0]], x="layer", y="value", name=f"{name} ({chance})", colour=colour,
                dash="dash" if pop else "solid", symbol=symbol, width=1.2 if pop else 1.9, hover="layer %{x}: %{y:.3f}",
            )  # fmt: skip
    if len(densities) > 1:
        choices = [
            {
                "label": f"{density:.0%}",
                "axis": "y",
                "title": "",
                "values": values[density],
                "errors": bars[density],
            }
            for density in densities
        ]
        set_variants(figure, name="neurons kept", variants=choices)
    add_reference(figure, y=1.0, text="chance", at="start")
    return figure


def _on(rows: pl.DataFrame, density: float, layers: pl.Series) -> pl.DataFrame:
    """The rows of a density on all layers, null where one has none."""
    return layers.to_frame().join(rows.filter(pl.col("r") == density), on="layer", how="left", maintain_order="left")


def caption_by_layer(frame: pl.DataFrame) -> str:
    """Where HU1 is lowest and highest, above each chance level."""
    rows = frame.filter((pl.col("control") == "") & (pl.col("r") == frame["r"].min()))
    parts = [
        f"Above {chance}, at {_density(frame)} kept, {_ends(part, 'HU1')}"
        for pop, (chance, _, _) in POPS.items()
        if (part := rows.filter(pl.col("pop") == pop)).height
    ]
    return (" ".join(parts) or "Only controls of HU1 were measured.") + counted(frame, "contexts")


def information(panel: ProfilePanel) -> pl.DataFrame:
    """`layer, metric, r, value, low, high, n`: HU2 and its value under shuffled labels."""
    parts = [
        measured(panel.measures, metric, numbers=("r",)).with_columns(metric=pl.lit(metric))
        for metric in ("hu2", "hu2_shuffled")
    ]
    frame = pl.concat(parts).filter(pl.col("layer").is_not_null())
    return frame.select("layer", "metric", "r", "value", "low", "high", "n").sort("metric", "r", "layer")


def draw_information(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    figure = canvas(
        x="layer",
        y="H(mask | token) / H(mask)",
        x_axis=layer_axis(frame),
        y_axis={"tickformat": ".2f"},
    )
    densities = frame["r"].unique().sort().to_list()
    for density, colour, dash in zip(densities, (DEPTH[0], DEPTH[4], INK), ("solid", "dash", "dot"), strict=False):
        rows = frame.filter((pl.col("metric") == "hu2") & (pl.col("r") == density))
        add_line(
            figure, rows, x="layer", y="value", name=f"{density:.0%} of neurons kept", colour=colour, dash=dash,
            hover="layer %{x}: %{y:.3f}",
        )  # fmt: skip
    check = frame.filter((pl.col("metric") == "hu2_shuffled") & (pl.col("r") == densities[0]))
    if check.height:
        add_line(
            figure, check, x="layer", y="value", name="shuffled labels (must be 1)", colour=MUTED, dash="dot",
            markers=False, width=1.2, hover="layer %{x}: %{y:.3f}",
        )  # fmt: skip
    return figure


def caption_information(frame: pl.DataFrame) -> str:
    """What the token id explains, where most and least, and whether the check holds."""
    rows = frame.filter((pl.col("metric") == "hu2") & (pl.col("r") == frame["r"].min()))
    if rows.is_empty():
        return f"Only the check of HU2 was measured.{counted(frame, 'texts')}"
    mean = as_float(rows["value"].mean())
    check = frame.filter(pl.col("metric") == "hu2_shuffled")["value"]
    off = (check - 1).abs().max()
    text = f"The token id explains {percent(1 - mean, 0)} of the entropy of the masks, {percent(mean, 0)} is left to "
    text += f"history. {_ends(rows, 'HU2')}"
    if isinstance(off, float) and off > 0.02:
        text += f" Shuffled labels give {number(as_float(check.mean()), 3)} instead of 1."
    return text + counted(frame, "texts")


def _ends(rows: pl.DataFrame, name: str) -> str:
    """Where a line by layer is lowest and highest, with the intervals that it has."""
    ordered = rows.sort("value")
    if ordered.height < 2:
        return (
            f"{name} = {number(as_float(ordered['value'][0]), 2)}." if ordered.height else f"{name} was not measured."
        )
    low, high = (
        f"{number(row['value'], 2)}{_bracket(row)} in layer {row['layer']}"
        for row in (ordered.row(0, named=True), ordered.row(-1, named=True))
    )
    return f"{name} runs from {low} to {high}."


def _bracket(row: dict[str, Any]) -> str:
    text = between(row.get("low"), row.get("high"))
    return f" ({text})" if text else ""
