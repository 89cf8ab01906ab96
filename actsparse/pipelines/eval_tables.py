"""From scored tokens and laps to the rows of `results.parquet`, and to the document that `--json` prints."""

from collections.abc import Sequence
from math import exp
from typing import Any

import polars as pl
import torch
from torch import Tensor

from actsparse.core.bootstrap import Interval, bootstrap_ratio
from actsparse.core.cost import attention_bytes_unread, ceiling, nothing_saved, saved
from actsparse.engine.timing import Speed
from actsparse.methods.plan import drops_of
from actsparse.methods.short import DENSE
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.speed import PlanSpeed, Speeds
from actsparse.pipelines.task_tables import task_document
from actsparse.pipelines.unread import unread_by_engine
from actsparse.results import EvalRow, Sparsity, StepBytes, Unit, param


def result_rows(
    groups: Sequence[PlanGroup],
    tokens: pl.DataFrame,
    layers: pl.DataFrame,
    cost: StepBytes,
    speeds: Speeds,
    seed: int = 0,
) -> list[EvalRow]:
    """Every measured number of an evaluation, dense first; `seed` is that of the bootstrap."""
    rows = quality_rows(DENSE, tokens, seed) + _dense_speed_rows(speeds)
    timed = [one.speed.dense_ms for one in speeds.plans.values() if one.speed is not None]
    rows += _rate_rows(DENSE, _median(timed) if timed else None, nothing_saved(), cost, speeds)
    rows += _byte_rows(DENSE, cost, nothing_saved())
    for group in groups:
        kept = layers.filter(pl.col("plan") == group.name)
        realised = realised_of(group, kept, cost)
        rows += quality_rows(group.name, tokens, seed)
        for reference in (DENSE, *(other.name for other in groups if other is not group)):
            rows += _difference_rows(group.name, reference, tokens, seed)
        rows += _sparsity_rows(group.name, group.plan.predicted, "predicted")
        rows += _sparsity_rows(group.name, realised, "realised")
        rows += _byte_rows(group.name, cost, nothing_saved() if group.plan.ideal else realised)
        rows += _layer_rows(group.name, kept)
        found = speeds.plans[group.name]
        useful = _useful(group, found, cost)
        if useful is not None:
            rows += _sparsity_rows(group.name, useful, "useful")
        rows += _speed_rows(found, useful or realised)
        rows += _rate_rows(found.plan, found.speed and found.speed.sparse_ms, useful, cost, speeds)
    return rows


def quality_rows(name: str, tokens: pl.DataFrame, seed: int = 0) -> list[EvalRow]:
    """Perplexity, KL and agreement of one plan, with intervals by bootstrap over blocks."""
    nll, n = _interval(name, tokens, "nll", seed)
    rows = [
        EvalRow(plan=name, metric="nll", value=nll.value, unit="nats", n=n, stderr=nll.stderr),
        EvalRow(plan=name, metric="ppl", value=_exp(nll.value), unit="1", n=n, stderr=_scaled(nll)),
        EvalRow(plan=name, metric="ppl_low", value=_exp(nll.low), unit="1", n=n),
        EvalRow(plan=name, metric="ppl_high", value=_exp(nll.high), unit="1", n=n),
    ]
    for metric, unit in (("kl", "nats"), ("top1", "share")):
        found, n = _interval(name, tokens, metric, seed)
        rows += [
            EvalRow(plan=name, metric=metric, value=found.value, unit=unit, n=n, stderr=found.stderr),
            EvalRow(plan=name, metric=f"{metric}_low", value=found.low, unit=unit, n=n),
            EvalRow(plan=name, metric=f"{metric}_high", value=found.high, unit=unit, n=n),
        ]
    return rows


def summary(
    model: Any, data: list[Any], device: dict[str, Any], groups: Sequence[PlanGroup], rows: list[EvalRow],
    speeds: Speeds, warnings: list[str], run: str,
) -> dict[str, Any]:  # fmt: skip
    """The document of `evaluate --json` (design.md, section 6)."""
    return {
        "model": model,
        "data": data,
        "device": device,
        "dense": {
            "quality": _pick(rows, DENSE, QUALITY),
            "speed": _pick(rows, DENSE, DENSE_SPEED) or None,
            "tasks": task_document(rows, DENSE),
        },
        "plans": [_plan_document(group, rows, speeds.plans[group.name]) for group in groups],
        "warnings": warnings,
        "run": run,
    }


FREE = ("exact_match_tokens", "diverged_frac", "dense_text_kl", "repetition")
QUALITY = ("ppl", "ppl_low", "ppl_high", "nll", "kl", "kl_low", "kl_high", "top1", "top1_low", "top1_high",
           "delta_nll", "delta_nll_low", "delta_nll_high")  # fmt: skip
DENSE_SPEED = ("ms_per_token", "generate_ms_per_token", "prefill_ms", "gb_per_s", "ceiling_share")
SPEED = ("ms_per_token", "dense_ms_per_token", "speedup", "speedup_low", "speedup_high", "ceiling", "prefill_ms",
         "select_ms", "ttft_ms", "break_even_tokens", "path_check", "path_lost", "path_flips", "gb_per_s",
         "ceiling_share")  # fmt: skip


def _plan_document(group: PlanGroup, rows: list[EvalRow], found: PlanSpeed) -> dict[str, Any]:
    speed: dict[str, Any] | None = None
    if found.speed is not None:
        speed = {**_pick(rows, group.name, SPEED), "verdict": found.speed.verdict.value, "reading": found.reading}
    return {
        "plan": group.name,
        "method": group.plan.method.name,
        "amount": group.plan.amount,
        "target": group.plan.target,
        "control": group.plan.method.is_control,
        "ideal": group.plan.ideal,
        "replicas": len(group.replicas),
        "sparsity": {
            basis: {row.metric: row.value for row in rows if row.plan == group.name and row.param == param(basis=basis)}
            or None
            for basis in ("predicted", "realised", "useful")
        }
        | {row.metric: row.value for row in rows if row.plan == group.name and row.param == param(basis="realised")},
        "quality": _pick([row for row in rows if row.param in ("", param(reference=DENSE))], group.name, QUALITY),
        "free_running": _pick(rows, group.name, FREE) or None,
        "tasks": task_document(rows, group.name),
        "speed": speed,
        "speed_reason": found.reason,
        "engine": found.engine,
        "tier": found.tier,
    }


def _pick(rows: list[EvalRow], plan: str, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        row.metric: {"value": row.value, "unit": row.unit, "n": row.n, "stderr": row.stderr}
        for metric in metrics
        for row in rows
        if row.plan == plan and row.metric == metric
    }


def not_finite(tokens: pl.DataFrame) -> list[str]:
    """A warning for every plan under which some scored tokens have no finite likelihood."""
    bad = tokens.filter(~pl.col("nll").is_finite()).group_by("plan", maintain_order=True).len()
    return [
        f"{plan}: {count} scored tokens have no finite likelihood; its quality is undefined"
        for plan, count in bad.rows()
    ]


def _interval(name: str, tokens: pl.DataFrame, column: str, seed: int) -> tuple[Interval, int]:
    """The mean over scored tokens with its interval over blocks, and the number of distinct scored tokens.

    Undefined as soon as one token is NaN or infinite: a mean over the others would flatter.
    """
    mine = tokens.filter(pl.col("plan") == name)
    n = mine.filter(pl.col("replica") == 0).height
    values = mine[column].cast(pl.Float64)
    if not values.is_finite().all():
        return Interval(value=None, low=None, high=None, n=n, stderr=None), n
    return bootstrap_ratio(*_by_block(mine, pl.col(column).cast(pl.Float64)), seed=seed), n


def _difference_rows(name: str, reference: str, tokens: pl.DataFrame, seed: int) -> list[EvalRow]:
    """The paired difference in NLL to dense or to another plan, token by token (means over the seeds of a control)."""
    mean = pl.col("nll").mean()
    places = ["block", "position"]
    other = tokens.filter(pl.col("plan") == reference).group_by(places, maintain_order=True).agg(mean.alias("other"))
    mine = (
        tokens.filter(pl.col("plan") == name)
        .group_by(places, maintain_order=True)
        .agg(mean)
        .join(other, on=places, maintain_order="left")
    )
    difference = mine["nll"] - mine["other"]
    if not difference.is_finite().all():
        return []
    found = bootstrap_ratio(*_by_block(mine, pl.col("nll") - pl.col("other")), seed=seed)
    where, n = param(reference=reference), mine.height
    return [
        EvalRow(plan=name, metric="delta_nll", param=where, value=found.value, unit="nats", n=n, stderr=found.stderr),
        EvalRow(plan=name, metric="delta_nll_low", param=where, value=found.low, unit="nats", n=n),
        EvalRow(plan=name, metric="delta_nll_high", param=where, value=found.high, unit="nats", n=n),
    ]


def _by_block(tokens: pl.DataFrame, values: pl.Expr) -> tuple[Tensor, Tensor]:
    grouped = (
        tokens.group_by("block", maintain_order=True)
        .agg(values.sum().alias("sum"), pl.len().alias("count"))
        .sort("block")
    )
    return torch.from_numpy(grouped["sum"].to_numpy().copy()), torch.from_numpy(
        grouped["count"].cast(pl.Float64).to_numpy().copy()
    )


def realised_of(group: PlanGroup, layers: pl.DataFrame, cost: StepBytes) -> Sparsity:
    """Sparsity of a plan counted over the sparse positions of the scored blocks."""
    kept = layers.filter(pl.col("plan") == group.name)
    means = kept.group_by("unit", "layer", maintain_order=True).agg(pl.col("kept_frac").mean())
    dropped = {(Unit(unit), int(layer)): 1 - share for unit, layer, share in means.iter_rows()}
    return saved(cost, drops_of(group.plan.layer_gates(), dropped, gated="gate" in cost.mlp))


def _useful(group: PlanGroup, found: PlanSpeed, cost: StepBytes) -> Sparsity | None:
    """What the engine did not read; nothing for an oracle, whose masks are known too late; None without an engine."""
    if group.plan.ideal:
        return nothing_saved()
    kept = {(one.unit.value, one.layer): one.share for one in found.useful_kept}
    return unread_by_engine(group.plan.layer_gates(), kept, cost)


def _sparsity_rows(name: str, sparsity: Sparsity, basis: str) -> list[EvalRow]:
    values = {
        "neuron_frac": sparsity.neuron_frac,
        "channel_frac": sparsity.channel_frac,
        "head_frac": sparsity.head_frac,
        "mlp_bytes_frac": sparsity.mlp_bytes_frac,
        "model_bytes_frac": sparsity.model_bytes_frac,
    }
    return [
        EvalRow(plan=name, metric=metric, param=param(basis=basis), value=value, unit="share", n=1)
        for metric, value in values.items()
        if value is not None
    ]


def _byte_rows(name: str, cost: StepBytes, sparsity: Sparsity) -> list[EvalRow]:
    """Weight bytes of one decode step by component."""
    mlp = cost.mlp_total * (1 - sparsity.mlp_bytes_frac)
    other = cost.total - cost.mlp_total - cost.attention - cost.head
    attention = cost.attention - attention_bytes_unread(cost, sparsity)
    values = {"bytes_mlp": mlp, "bytes_attention": attention, "bytes_head": cost.head, "bytes_other": other}
    return [EvalRow(plan=name, metric=metric, value=float(v), unit="bytes", n=1) for metric, v in values.items()]


def _layer_rows(name: str, kept: pl.DataFrame) -> list[EvalRow]:
    """Means over blocks of what each layer kept and got wrong, with their standard errors over blocks.

    The seeds of a control are not independent draws of text, so each block is first the mean over them; no standard
    error with fewer than two blocks.
    """
    metrics = {"kept_frac": "share", "rel_err": "1", "rel_err_path": "1"}
    blocks = kept.group_by("layer", "unit", "block", maintain_order=True).agg(
        *(pl.col(m).mean() for m in metrics), pl.col("positions").sum()
    )
    errors = ((pl.col(m).std() / pl.col(m).count().sqrt()).alias(f"{m}_stderr") for m in metrics)
    means = (
        blocks.group_by("layer", "unit", maintain_order=True)
        .agg(*(pl.col(m).mean() for m in metrics), *errors, pl.col("positions").sum())
        .sort("layer", "unit", maintain_order=True)
    )
    return [
        EvalRow(
            plan=name,
            metric=metric,
            param=_place(row["layer"], Unit(row["unit"])),
            value=row[metric],
            unit=unit,
            n=row["positions"],
            stderr=row[f"{metric}_stderr"],
        )
        for row in means.iter_rows(named=True)
        for metric, unit in metrics.items()
    ]


def _place(layer: int, unit: Unit) -> str:
    """Where a row of a layer belongs: neurons need no name."""
    if unit is Unit.NEURON:
        return param(layer=layer)
    return param(layer=layer, proj=unit.value) if unit.is_projection else param(layer=layer, unit=unit.value)


def _dense_speed_rows(speeds: Speeds) -> list[EvalRow]:
    timed = [one.speed for one in speeds.plans.values() if one.speed is not None]
    rows: list[EvalRow] = []
    if timed:
        n = sum(one.pairs for one in timed)
        for metric, values in (
            ("ms_per_token", [one.dense_ms for one in timed]),
            ("prefill_ms", [one.dense_prefill_ms for one in timed]),
            ("ttft_ms", [one.dense_prefill_ms for one in timed]),
        ):
            rows.append(EvalRow(plan=DENSE, metric=metric, value=_median(values), unit="ms", n=n))
    own = [lap.seconds / lap.tokens * 1e3 for lap in speeds.dense.laps]
    if own:
        rows.append(EvalRow(plan=DENSE, metric="generate_ms_per_token", value=_median(own), unit="ms", n=len(own)))
    return rows


def _speed_rows(found: PlanSpeed, not_read: Sparsity) -> list[EvalRow]:
    rows = []
    if found.path_check is not None:
        rows.append(EvalRow(plan=found.plan, metric="path_check", value=found.path_check, unit="nats", n=1))
    if found.path_lost is not None:
        rows.append(EvalRow(plan=found.plan, metric="path_lost", value=found.path_lost, unit="tokens", n=1))
    if found.path_flips is not None:
        rows.append(EvalRow(plan=found.plan, metric="path_flips", value=found.path_flips, unit="share", n=1))
    speed: Speed | None = found.speed
    if speed is None:
        return rows
    values = {
        "ms_per_token": (speed.sparse_ms, "ms"),
        "dense_ms_per_token": (speed.dense_ms, "ms"),
        "speedup": (speed.speedup, "1"),
        "speedup_low": (speed.low, "1"),
        "speedup_high": (speed.high, "1"),
        "ceiling": (ceiling(not_read.model_bytes_frac), "1"),
        "prefill_ms": (speed.sparse_prefill_ms, "ms"),
        "select_ms": (speed.select_ms, "ms"),
        "ttft_ms": (speed.ttft_ms, "ms"),
        "break_even_tokens": (speed.break_even_tokens, "tokens"),
    }
    return rows + [
        EvalRow(plan=found.plan, metric=metric, value=value, unit=unit, n=speed.pairs)
        for metric, (value, unit) in values.items()
    ]


def _rate_rows(
    name: str, ms: float | None, not_read: Sparsity | None, cost: StepBytes, speeds: Speeds
) -> list[EvalRow]:
    """Weight bytes a second of decode, and their share of what this device reads at best, both of this run; without a
    value where the engine does not know what it read (`not_read` None)."""
    best = speeds.dense.read_bandwidth
    if ms is None or best is None:
        return []
    rate = None if not_read is None else cost.total * (1 - not_read.model_bytes_frac) / (ms / 1e3)
    return [
        EvalRow(plan=name, metric="gb_per_s", value=None if rate is None else rate / 1e9, unit="GB/s", n=1),
        EvalRow(plan=name, metric="ceiling_share", value=None if rate is None else rate / best, unit="share", n=1),
    ]


def _exp(value: float | None) -> float | None:
    return None if value is None else exp(min(value, 700.0))


def _scaled(nll: Interval) -> float | None:
    """The standard error of exp(nll), to first order."""
    return None if nll.stderr is None or nll.value is None else exp(min(nll.value, 700.0)) * nll.stderr


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
