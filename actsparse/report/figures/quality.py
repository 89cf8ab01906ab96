"""Quality against sparsity, with the baselines that every method must beat."""

from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import (
    add_reference,
    add_usable_band,
    canvas,
    floats,
    log_axis,
    look_of,
    plain,
    set_variants,
)
from actsparse.report.figures.columns import as_float, first_known
from actsparse.report.looks import Looks
from actsparse.report.outcomes import Outcome
from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.verdicts import SAME_SIZE, USABLE
from actsparse.report.wording import count, listed, number, percent

CAP = 30.0
TITLES = {
    "model_bytes_frac": "weight bytes of a decode step not read (share of the model, realised)",
    "mlp_bytes_frac": "weight bytes not read (share of the MLPs, realised)",
    "neuron_frac": "neurons dropped (share, realised)",
    "channel_frac": "input channels dropped (share by parameters, realised)",
}
CHOICES = {
    "model_bytes_frac": "model bytes",
    "mlp_bytes_frac": "MLP bytes",
    "neuron_frac": "neurons",
    "channel_frac": "channels",
}


def data(panel: EvalPanel) -> pl.DataFrame:
    """One row a plan with its series, role, perplexity and realised sparsity on every basis (null: none)."""
    schema = {"plan": pl.String, "series": pl.String, "role": pl.String, "ppl": pl.Float64, "ppl_low": pl.Float64}
    more = {"ppl_high": pl.Float64, "dense_ppl": pl.Float64, **dict.fromkeys(TITLES, pl.Float64), "n": pl.Int64}
    frame = pl.DataFrame([_row(outcome) for outcome in panel.compared], schema=schema | more, orient="row")
    return frame.filter(pl.col("ppl").is_not_null() & pl.any_horizontal(pl.col(list(TITLES)).is_not_null()))


def _row(outcome: Outcome) -> tuple[object, ...]:
    suffix = outcome.label.removeprefix(outcome.name.short)
    shares = outcome.realised or outcome.predicted
    return (
        *(outcome.label, outcome.name.series + suffix, outcome.name.role.value),
        *(outcome.ppl.value, outcome.ppl.low, outcome.ppl.high, outcome.dense_ppl.value),
        *(shares.get(basis) for basis in TITLES),
        outcome.ppl.n,
    )


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    basis = _basis(frame)
    dense = first_known(frame["dense_ppl"])
    start = [dense] if dense else []
    low = (dense or as_float(frame["ppl"].min())) * 0.9
    high = min(CAP * low, 1.3 * as_float(frame["ppl"].max()))
    figure = canvas(
        x=TITLES[basis],
        y="perplexity (log)",
        height=400,
        x_axis={"rangemode": "tozero", "tickformat": ".2~p"},
        y_axis=log_axis(low, max(high, low * 1.3)),
    )
    if dense:
        add_usable_band(figure, dense, USABLE)
        add_reference(figure, y=dense, text=f"dense {number(dense)}")
    values: dict[str, list[list[Any]]] = {name: [] for name in TITLES if frame[name].is_not_null().any()}
    for (series,), rows in frame.partition_by("series", as_dict=True, maintain_order=True).items():
        ordered = rows.sort(basis, nulls_last=True)
        _series(figure, str(series), ordered, basis, start, looks)
        for name, lists in values.items():
            lists.append([0.0] * len(start) + ordered[name].to_list())
    if len(values) > 1:
        choices = [
            {"label": CHOICES[name], "axis": "x", "title": TITLES[name], "values": lists}
            for name, lists in values.items()
        ]
        set_variants(figure, name="sparsity counted in", variants=choices)
    return figure


def _series(figure: go.Figure, series: str, rows: pl.DataFrame, basis: str, start: list[float], looks: Looks) -> None:
    look = look_of(looks, rows["plan"][0])
    control = rows["role"][0] != Role.METHOD
    up = [0.0] * len(start) + [_gap(high, ppl) for high, ppl in rows.select("ppl_high", "ppl").iter_rows()]
    down = [0.0] * len(start) + [_gap(ppl, low) for ppl, low in rows.select("ppl", "ppl_low").iter_rows()]
    figure.add_scatter(
        x=floats([0.0] * len(start) + rows[basis].to_list()),
        y=floats([*start, *rows["ppl"].to_list()]),
        error_y={
            "type": "data",
            "symmetric": False,
            "array": floats(up),
            "arrayminus": floats(down),
            "thickness": 1,
            "width": 0,
        },
        mode="lines+markers",
        name=plain(series),
        line={"color": look.colour, "width": 1.4 if control else 2, "dash": look.dash if control else "solid"},
        marker={"size": [0] * len(start) + [8] * rows.height, "color": look.colour},
        customdata=[*(["dense"] * len(start)), *[plain(plan) for plan in rows["plan"]]],
        hovertemplate="%{customdata}<br>%{x:.1%}<br>perplexity %{y:.4g}<extra></extra>",
    )


def _gap(high: float | None, low: float | None) -> float:
    return max(0.0, high - low) if high is not None and low is not None else 0.0


def _basis(frame: pl.DataFrame) -> str:
    return next(name for name in TITLES if frame[name].is_not_null().any())


def caption(frame: pl.DataFrame) -> str:
    """The best plan near the most crowded sparsity, how the baselines do there, and which baselines are missing."""
    basis = _basis(frame)
    methods = frame.filter(pl.col("role") == Role.METHOD).drop_nulls(basis).sort("ppl")
    text = ""
    if methods.height:
        best = methods.row(0, named=True)
        place = f"{number(best['ppl'])} at {percent(best[basis], 0)} of {CHOICES[basis]}"
        text = f"Of {methods.height} plans {best['plan']} costs least: {place}."
    text += _against_static(frame, basis)
    roles = set(frame["role"])
    missing = [role.value for role in (Role.RANDOM, Role.STATIC, Role.ORACLE) if role not in roles]
    most = frame["n"].drop_nulls().max()
    text += f" No {listed(missing)} baseline in these runs." if missing else ""
    return f"{text} n = {count(int(as_float(most)))} scored tokens a plan.".strip() if most else text.strip()


def _against_static(frame: pl.DataFrame, basis: str) -> str:
    """Which methods a static mask of the same size beats."""
    static = frame.filter(pl.col("role") == Role.STATIC).drop_nulls(basis)
    beaten = []
    for row in frame.filter(pl.col("role") == Role.METHOD).drop_nulls(basis).iter_rows(named=True):
        near = static.filter((pl.col(basis) - row[basis]).abs() <= SAME_SIZE * row[basis]).sort("ppl")
        if near.height and near["ppl"][0] < row["ppl"]:
            beaten.append(f"{row['plan']} ({number(row['ppl'])} against {number(near['ppl'][0])})")
    if not static.height:
        return ""
    return (
        f" A static mask of the same size does better than {listed(beaten)}."
        if beaten
        else " No plan does worse than a static mask of its size."
    )
