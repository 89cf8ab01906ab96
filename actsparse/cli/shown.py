"""What each command shows when it has finished: the answer, three headline numbers, the next command."""

import shlex
from math import log
from typing import Any

import polars as pl

from actsparse.cli.output import Output
from actsparse.errors import QualityGateMissed
from actsparse.results import SiteKind
from actsparse.specs import EvalSpec, ReportSpec
from actsparse.store.codec import pretty
from actsparse.store.runs import EvalRun, PlanRun, ProfileRun, StudyRun

MISSING = "-"


def show_profile(run: ProfileRun, output: Output) -> None:
    """A profile: CETT sparsity by layer and in the mean, and where the tables are."""
    if output.json:
        output.document((run.path / "summary.json").read_text())
        return
    rows = run.measures.filter(pl.col("metric") == "cett_sparsity")
    targets = list(dict.fromkeys(rows["param"].to_list()))
    table = []
    for layer in [*rows["layer"].drop_nulls().unique(maintain_order=True).to_list(), None]:
        mine = rows.filter(pl.col("layer").is_null() if layer is None else pl.col("layer") == layer)
        values = dict(zip(mine["param"], mine["value"], strict=True))
        table.append(["mean" if layer is None else f"layer {layer}", *(_percent(values.get(t)) for t in targets)])
    columns = ["", *(f"CETT {target.partition('=')[2]}" for target in targets)]
    if targets:
        output.table("Neurons that can be dropped at a given error (share of neurons)", columns, table)
    _show_routers(run, output)
    zeros = _mean(run, "zero_frac", SiteKind.NEURON)
    gini = _mean(run, "neuron_gini", SiteKind.NEURON)
    tokens = run.measures.filter(pl.col("metric") == "tokens")["value"][0]
    output.line(f"{tokens:,.0f} tokens; exact zeros {_percent(zeros)} of neuron activations; firing Gini {gini:.2f}")
    output.line(f"written to {run.path}")
    model = run.manifest.model
    mixed = model is not None and model.experts is not None
    asked = "--method static --sparsity 0.5" if mixed else "--method tda --target-error 0.2"
    output.note(f"next: actsparse threshold {shlex.quote(str(run.path))} {asked}")


def _show_routers(run: ProfileRun, output: Output) -> None:
    """Of a mixture of experts: how spread its routers are, layer by layer."""
    model = run.manifest.model
    entropy = run.measures.filter(pl.col("metric") == "router_entropy")
    if model is None or model.experts is None or entropy.is_empty():
        return
    shares = run.measures.filter(pl.col("metric") == "expert_frac")
    rows = []
    for layer, nats in entropy.select("layer", "value").iter_rows():
        found = shares.filter(pl.col("layer") == layer)["value"].to_list()
        rows.append([f"layer {layer}", f"{nats:.2f}", _percent(max(found)), _percent(min(found))])
    count, top_k = model.experts.count, model.experts.top_k
    title = f"Routers: {top_k} of {count} experts a token; entropy at most {log(count):.2f} nats"
    output.table(title, ("", "entropy, nats", "most used expert", "least used expert"), rows)


THROUGHPUT = {
    "tokens/s": "tokens_per_s",
    "ms p50": "ms_p50",
    "p90": "ms_p90",
    "p99": "ms_p99",
    "first token ms": "ttft_ms",
    "speed-up": "speedup",
    "GB/s": "gb_per_s",
}
"""The columns of the throughput table, and their metrics."""


def show_plan(run: PlanRun, output: Output) -> None:
    """A plan: what it drops, on every basis."""
    if output.json:
        output.document((run.path / "summary.json").read_text())
        return
    plan = run.plan
    kinds = [("predicted", plan.predicted), ("on the calibration text", plan.realised)]
    rows = [
        [name, _percent(one.neuron_frac), _percent(one.mlp_bytes_frac), _percent(one.model_bytes_frac)]
        for name, one in kinds
        if one is not None
    ]
    rows += [
        [f"on {one.text.source}", _percent(one.realised.neuron_frac), _percent(one.realised.mlp_bytes_frac),
         _percent(one.realised.model_bytes_frac)]
        for one in plan.measured
        if one.text.role == "transfer"
    ]  # fmt: skip
    output.table(f"{plan.short}: dropped", ["", "neurons", "MLP bytes", "model bytes"], rows)
    for one in plan.measured:
        output.line(f"mean local error on {one.text.role} text ({one.text.source}): {one.rel_err:.3f}")
    recalls = [one.recall for one in plan.layers if one.recall is not None]
    if recalls:
        above = [one.recall_corrected or 0.0 for one in plan.layers if one.recall is not None]
        output.line(
            f"routers of {len(recalls)} layers: held-out recall {sum(recalls) / len(recalls):.1%},"
            f" {sum(above) / len(above):.2f} of the way from chance to perfect"
        )
    output.line(f"written to {run.path}")
    model = plan.model.requested
    output.note(f"next: actsparse evaluate --model {shlex.quote(model)} --plan {shlex.quote(str(run.path))}")


def show_eval(run: EvalRun, output: Output) -> None:
    """An evaluation: one line a plan with quality and speed, and where the run is."""
    if output.json:
        output.document((run.path / "summary.json").read_text())
        return
    document = run.summary
    dense = document["dense"]
    ms = _value(dense["speed"], "ms_per_token")
    rows = [["dense", "0.0 %", _number(_value(dense["quality"], "ppl")), "0.000", "100.0 %", _ms(ms), MISSING, MISSING]]
    rows += [_plan_row(plan) for plan in document["plans"]]
    columns = ["plan", "model bytes", "perplexity", "KL", "top-1", "ms/token", "speed-up (95 %)", "ceiling"]
    output.table("Quality in the decode regime, and speed of real sparse decode", columns, rows)
    for plan in document["plans"]:
        if plan["speed_reason"] and not plan["control"]:
            output.note(f"{plan['plan']}: not timed: {plan['speed_reason']}")
    _show_throughput(run.throughput, output)
    output.line(f"written to {run.path}")
    output.note(f"next: actsparse report {shlex.quote(str(run.path))}")


def _show_throughput(rows: pl.DataFrame, output: Output) -> None:
    """One line a plan, batch size, prompt length and generated length; nothing where none was asked for."""
    shape = ["batch_size", "prompt_length", "gen_length", "plan"]
    found: dict[tuple[Any, ...], dict[str, float | None]] = {}
    for *place, metric, value in (
        rows.select(*shape, "metric", "value").sort(shape[:3], maintain_order=True).iter_rows()
    ):
        found.setdefault(tuple(place), {})[metric] = value
    if not found:
        return
    lines = [
        [str(batch), str(prompt), str(gen), plan, *(_number(one.get(metric)) for metric in THROUGHPUT.values())]
        for (batch, prompt, gen, plan), one in found.items()
    ]
    output.table("Throughput", ["batch", "prompt", "new", "plan", *THROUGHPUT], lines)


def show_study(run: StudyRun, output: Output) -> None:
    """A study: what each experiment asked and found, in one sentence each."""
    if output.json:
        output.document((run.path / "summary.json").read_text())
        return
    for one in run.experiments:
        output.line(f"{one.experiment} {one.title}{' (quick)' if one.quick else ''}")
        output.line(f"  claim: {one.claim} ({one.source})")
        output.line(f"  found: {one.verdict.value}: {one.conclusion}")
        for note in one.notes:
            output.note(f"{one.experiment}: {note}")
    output.line(f"written to {run.path}")
    output.note(f"next: actsparse report {shlex.quote(str(run.path))}")


def show_run(found: Any, report: Any, output: Output) -> None:
    """The four verbs: the evaluation's table and the report."""
    if output.json:
        document = {
            "profile": str(found.profile.path),
            "plan": str(found.plan.path),
            "evaluation": found.evaluation.summary,
            "report": str(report),
        }
        output.document(pretty(document))
        return
    show_eval(found.evaluation, Output(quiet=True, out=output.out, err=output.err))
    output.line(f"report: {report}")


def show_report(spec: ReportSpec, output: Output) -> None:
    """The report in the terminal, or its view model as JSON."""
    from actsparse.report.document import document
    from actsparse.report.text import summary
    from actsparse.report.view import build_view

    view = build_view(spec)
    if output.json:
        output.document(pretty(document(view)))
    else:
        output.out.print(summary(view))


def check_gate(run: EvalRun, spec: EvalSpec) -> None:
    """Raise QualityGateMissed naming every plan that is worse than was asked."""
    dense = _value(run.summary["dense"]["quality"], "ppl") or float("nan")
    missed = []
    for plan in run.summary["plans"]:
        if plan["control"] and plan["plan"] not in spec.plans:
            continue
        increase = (_value(plan["quality"], "ppl") or float("inf")) / dense - 1
        top1 = _value(plan["quality"], "top1") or 0.0
        if spec.max_ppl_increase is not None and not increase <= spec.max_ppl_increase:
            missed.append(f"{plan['plan']}: perplexity {increase:+.1%}, allowed {spec.max_ppl_increase:+.1%}")
        if spec.min_top1 is not None and not top1 >= spec.min_top1:
            missed.append(f"{plan['plan']}: top-1 agreement {top1:.1%}, asked {spec.min_top1:.1%}")
    if missed:
        raise QualityGateMissed("the quality gate is missed: " + "; ".join(missed), "drop fewer neurons")


def _plan_row(plan: dict[str, Any]) -> list[str]:
    quality, speed = plan["quality"], plan["speed"]
    speedup = MISSING
    if speed:
        low, high = _value(speed, "speedup_low"), _value(speed, "speedup_high")
        speedup = f"{_value(speed, 'speedup'):.2f}x ({low:.2f}-{high:.2f})"
    return [
        plan["plan"],
        _percent(plan["sparsity"]["model_bytes_frac"]),
        _number(_value(quality, "ppl")),
        _number(_value(quality, "kl")),
        _percent(_value(quality, "top1")),
        _ms(_value(speed, "ms_per_token")),
        speedup,
        f"{_value(speed, 'ceiling'):.2f}x" if speed else MISSING,
    ]


def _value(group: dict[str, Any] | None, name: str) -> float | None:
    return None if not group or name not in group else group[name]["value"]


def _mean(run: ProfileRun, metric: str, kind: str) -> float:
    values = run.measures.filter((pl.col("metric") == metric) & (pl.col("kind") == kind))["value"]
    return float(sum(values.to_list()) / max(1, len(values)))


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}".replace("%", " %")


def _number(value: float | None) -> str:
    return MISSING if value is None else (f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}")


def _ms(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
