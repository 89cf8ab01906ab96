"""Sparsity that was predicted by the fit, realised on the scored text, and useful to the kernel that ran."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, look_of, plain, set_variants
from actsparse.report.figures.quality import CHOICES, TITLES
from actsparse.report.looks import MUTED, Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.wording import listed, percent

STAGES = {"predicted": "circle-open", "realised": "circle", "useful": "line-ns-open"}


def data(panel: EvalPanel) -> pl.DataFrame:
    """`plan, basis, predicted, realised, useful`."""
    rows = [
        (outcome.label, basis, outcome.predicted.get(basis), outcome.realised.get(basis), outcome.useful.get(basis))
        for outcome in panel.compared
        for basis in TITLES
    ]
    schema = {"plan": pl.String, "basis": pl.String, **dict.fromkeys(STAGES, pl.Float64)}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.filter(pl.sum_horizontal(pl.col(list(STAGES)).is_not_null()) > 1)


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    plans = list(dict.fromkeys(frame["plan"]))
    bases = [basis for basis in TITLES if basis in set(frame["basis"])]
    figure = canvas(
        x="share not used",
        y="",
        height=110 + 26 * len(plans),
        x_axis={"rangemode": "tozero", "tickformat": ".2~p"},
        y_axis={"autorange": "reversed", "type": "category", "ticks": "", "showline": False},
    )
    colours = [look_of(looks, plan).colour for plan in plans]
    per_basis = {basis: _values(frame, basis, plans) for basis in bases}
    for stage, symbol in STAGES.items():
        figure.add_scatter(
            x=floats(per_basis[bases[0]][stage]),
            y=[plain(plan) for plan in plans],
            mode="markers",
            name=stage,
            marker={
                "size": 14 if stage == "useful" else 10,
                "symbol": symbol,
                "color": colours,
                "line": {"width": 2, "color": colours},
            },
            legendrank=1000,
            hovertemplate=f"%{{y}}: %{{x:.1%}}<extra>{stage}</extra>",
        )
    figure.update_layout(legend={"font": {"color": MUTED}})
    choices = [
        {
            "label": CHOICES[basis],
            "axis": "x",
            "title": f"share of {CHOICES[basis]} not used",
            "values": [per_basis[basis][stage] for stage in STAGES],
        }
        for basis in bases
    ]
    figure.update_xaxes(title={"text": str(choices[0]["title"])})
    if len(choices) > 1:
        set_variants(figure, name="sparsity counted in", variants=choices)
    return figure


def _values(frame: pl.DataFrame, basis: str, plans: list[str]) -> dict[str, list[float | None]]:
    rows = {row["plan"]: row for row in frame.filter(pl.col("basis") == basis).iter_rows(named=True)}
    return {stage: [rows[plan][stage] if plan in rows else None for plan in plans] for stage in STAGES}


def caption(frame: pl.DataFrame) -> str:
    """The largest gap between what the fit promised and what was counted, and plans whose kernel skips less."""
    basis = next(basis for basis in TITLES if basis in set(frame["basis"]))
    rows = frame.filter(pl.col("basis") == basis)
    gaps = rows.with_columns(gap=pl.col("realised") - pl.col("predicted")).drop_nulls("gap").sort(pl.col("gap").abs())
    text = "No plan has both a prediction and a count."
    if gaps.height:
        row = gaps.row(-1, named=True)
        text = (
            f"Largest gap between fit and count in {CHOICES[basis]}: {row['plan']}, "
            f"{percent(row['predicted'])} predicted, "
            f"{percent(row['realised'])} realised ({percent(row['gap'], signed=True)[:-2]} points)."
        )
    idle = rows.filter((pl.col("useful") < pl.col("realised") - 0.005).fill_null(value=False))["plan"].to_list()
    text += f" The kernel skips less than the mask allows in {listed(idle)}." if idle else ""
    return f"{text} n = {rows.height} plans."
