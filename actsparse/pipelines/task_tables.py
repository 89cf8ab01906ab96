"""From the items of tasks to rows of `results.parquet` and to the document of `--json`."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from actsparse.core.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from actsparse.methods.short import DENSE
from actsparse.results import EvalRow, param

KEYS = ("task", "metric", "filter")


def task_rows(items: pl.DataFrame, seed: int = 0) -> list[EvalRow]:
    """Means over items with intervals by bootstrap over items, paired differences between plans, and how much of each
    task was predicted from sparse positions. A random control's value of an item is the mean over its seeds."""
    rows: list[EvalRow] = []
    for key, group in items.group_by(KEYS, maintain_order=True):
        task, metric, chosen = (str(part) for part in key)
        where = {"task": task} | ({"filter": chosen} if chosen else {})
        values = {str(name): _by_item(mine) for (name,), mine in group.group_by(["plan"], maintain_order=True)}
        for plan, mine in values.items():
            rows += _interval_rows(plan, metric, param(**where), bootstrap_mean(mine, seed=seed))
            for reference, other in values.items():
                if plan not in (DENSE, reference):
                    found = bootstrap_difference(mine, other, seed=seed)
                    rows += _interval_rows(plan, f"delta_{metric}", param(**where, reference=reference), found)
    return rows + _exercised_rows(items)


def not_exercised(items: pl.DataFrame) -> list[str]:
    """A warning for every task and plan of which no scored token was predicted from a sparse position."""
    return [
        f"task {task} is not exercised by {plan}: every scored token was predicted from a dense position, so the score"
        " is the dense model's (--dense-upto P-1 makes the last context token sparse)"
        for task, plan, share in _exercised(items)
        if plan != DENSE and share == 0
    ]


def task_document(rows: Sequence[EvalRow], plan: str) -> dict[str, Any]:
    """What one plan got in each task: {task: {metric: {value, low, high, n, stderr}, exercised_frac}}."""
    found: dict[str, Any] = {}
    mine = {(row.metric, row.param): row for row in rows if row.plan == plan and "task=" in row.param}
    for (metric, where), row in mine.items():
        if "reference=" in where or metric.endswith(("_low", "_high")):
            continue
        keys = dict(part.split("=", 1) for part in where.split(","))
        name = f"{metric},{keys['filter']}" if "filter" in keys else metric
        entry = {"value": row.value, "unit": row.unit, "n": row.n, "stderr": row.stderr}
        ends = {end: mine.get((f"{metric}_{end}", where)) for end in ("low", "high")}
        found.setdefault(keys["task"], {})[name] = entry | {k: one.value for k, one in ends.items() if one}
    return found


def _by_item(mine: pl.DataFrame) -> Tensor:
    means = mine.group_by("item", maintain_order=True).agg(pl.col("value").mean()).sort("item")["value"]
    return torch.from_numpy(means.to_numpy().copy())


def _interval_rows(plan: str, metric: str, where: str, found: Interval) -> list[EvalRow]:
    ends = (("", found.value, found.stderr), ("_low", found.low, None), ("_high", found.high, None))
    return [
        EvalRow(plan=plan, metric=metric + end, param=where, value=value, unit="share", n=found.n, stderr=stderr)
        for end, value, stderr in ends
    ]


def _exercised(items: pl.DataFrame) -> list[tuple[str, str, float]]:
    sums = items.group_by(["task", "plan"], maintain_order=True).agg(
        pl.col("sparse_tokens").sum(), pl.col("scored_tokens").sum()
    )
    return [(task, plan, sparse / max(1, scored)) for task, plan, sparse, scored in sums.rows()]


def _exercised_rows(items: pl.DataFrame) -> list[EvalRow]:
    counts = items.group_by(["task", "plan"], maintain_order=True).agg(pl.col("item").n_unique().alias("n"))
    sizes = {(task, plan): n for task, plan, n in counts.rows()}
    return [
        EvalRow(plan=plan, metric="exercised_frac", param=param(task=task), value=share, unit="share",
                n=sizes[task, plan])
        for task, plan, share in _exercised(items)
    ]  # fmt: skip
