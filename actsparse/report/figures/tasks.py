"""Task scores: accuracy and exact match of every plan, with intervals, and which tasks a sparse path never touched."""

import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, floats, look_of, plain
from actsparse.report.figures.columns import as_float, param_text
from actsparse.report.figures.marks import ends, label_axis
from actsparse.report.looks import Looks
from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.wording import between, count, listed, percent

METRICS = ("acc", "exact_match", "acc_norm")


def scores(panel: EvalPanel) -> pl.DataFrame:
    """`plan, task, metric, filter, value, low, high, n, delta, delta_low, delta_high, exercised`: one row a score.

    `delta` is the paired difference to dense, `exercised` the share of scored tokens that a sparse position predicted.
    """
    rows = panel.results.with_columns(task=param_text("task"), filter=param_text("filter")).drop_nulls("task")
    keys = ["plan", "task", "filter"]
    parts = []
    for metric in METRICS:
        found = rows.filter((pl.col("metric") == metric) & pl.col("value").is_finite())
        frame = found.select(*keys, "n", value="value", metric=pl.lit(metric))
        dense = rows.filter(pl.col("param").str.contains("reference=dense"))
        for name, metric_name, source in (
            ("low", f"{metric}_low", rows),
            ("high", f"{metric}_high", rows),
            ("delta", f"delta_{metric}", dense),
            ("delta_low", f"delta_{metric}_low", dense),
            ("delta_high", f"delta_{metric}_high", dense),
        ):
            end = source.filter(pl.col("metric") == metric_name).select(*keys, pl.col("value").alias(name))
            frame = frame.join(end, on=keys, how="left", nulls_equal=True, maintain_order="left")
        parts.append(frame)
    used = rows.filter(pl.col("metric") == "exercised_frac").select("plan", "task", exercised="value")
    frame = pl.concat(parts).join(used, on=["plan", "task"], how="left", maintain_order="left")
    ends_ = ("value", "low", "high", "n", "delta", "delta_low", "delta_high", "exercised")
    return frame.select("plan", "task", "metric", "filter", *ends_)


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """A row a task and metric, a mark a plan; hollow where no scored token was sparse."""
    frame = frame.with_columns(name=_names(frame))
    names = list(dict.fromkeys(frame["name"]))
    plans = list(dict.fromkeys(frame["plan"]))
    figure = canvas(
        x="score (share of items)",
        y="",
        height=130 + (14 + 9 * len(plans)) * len(names),
        x_axis={"range": [0, 1.02], "tickformat": ".0%"},
        y_axis=label_axis(),
    )
    for plan in plans:
        rows, look = frame.filter(pl.col("plan") == plan), look_of(looks, plan)
        hollow = [used == 0 and plan != Role.DENSE for used in rows["exercised"]]
        figure.add_scatter(
            x=floats(rows["value"]),
            y=[plain(name) for name in rows["name"]],
            error_x=ends(rows["value"], rows["low"], rows["high"], look.colour),
            mode="markers",
            name=plain(plan),
            marker={
                "size": 9,
                "color": look.colour,
                "symbol": [look.opened().symbol if empty else look.symbol for empty in hollow],
                "line": {"width": 1.5, "color": look.colour},
            },
            hovertemplate=f"%{{y}}: %{{x:.1%}}<extra>{plain(plan)}</extra>",
            cliponaxis=False,
        )
    figure.update_layout(scattermode="group", scattergap=0.35)
    return figure


def _names(frame: pl.DataFrame) -> pl.Series:
    return pl.Series(
        [
            f"{task}, {metric.replace('_', ' ')}" + (f" ({way})" if way else "")
            for task, metric, way in frame.select("task", "metric", "filter").iter_rows()
        ],
        dtype=pl.String,
    )


def caption(frame: pl.DataFrame) -> str:
    """The largest loss against dense that is sure, and tasks that no sparse position touched."""
    sparse = frame.filter((pl.col("plan") != Role.DENSE) & pl.col("delta").is_not_null())
    sure = sparse.filter(pl.col("delta_high") < 0).sort("delta")
    tasks = frame["task"].n_unique()
    if sure.height:
        row = sure.row(0, named=True)
        low, high = 100 * as_float(row["delta_low"]), 100 * as_float(row["delta_high"])
        text = (
            f"The largest sure loss is {row['plan']} on {row['task']}: {percent(row['delta'], signed=True)[:-2]} "
            f"points ({between(low, high, 1)}) against dense, {percent(row['value'])} left"
        )
        text += f"; {sure['plan'].n_unique()} of {sparse['plan'].n_unique()} plans lose for sure somewhere"
    elif sparse.height:
        text = f"No plan loses for sure against dense on {tasks} task{'s' * (tasks > 1)}"
    else:
        text = f"Scores on {tasks} task{'s' * (tasks > 1)}, without a comparison to dense"
    idle = sparse.filter(pl.col("exercised") == 0)["task"].unique(maintain_order=True).to_list()
    text += f". Not exercised (hollow; the score is the dense model's): {listed(idle)}" if idle else ""
    n = frame["n"].max()
    return f"{text}." + (f" n = {count(n)} items at most." if isinstance(n, int) and n else "")
