"""What each command shows when it has finished: the answer, three headline numbers, the next command."""

import shlex
from typing import Any

import polars as pl

from actsparse.cli.output import Output
from actsparse.cli.wording import MISSING, milliseconds, number, percent
from actsparse.errors import QualityGateMissed
from actsparse.specs import EvalSpec, ReportSpec
from actsparse.store.codec import pretty
from actsparse.store.runs import EvalRun, PlanRun, StudyRun

RULER = "a ruler saves nothing: its masks need what they would save"
TIMES = (
    "ms/token: medians over laps, dense ones in turns with the plan's; speed-up: median of the ratios of neighbouring"
    " laps, which may differ from the ratio of the two medians"
)


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
    kinds += [(f"on {one.text.source}", one.realised) for one in plan.measured if one.text.role == "transfer"]
    rows = [
        [name, percent(one.neuron_frac), _saved(one.mlp_bytes_frac, ideal=plan.ideal),
         _saved(one.model_bytes_frac, ideal=plan.ideal)]
        for name, one in kinds
        if one is not None
    ]  # fmt: skip
    output.table(f"{plan.short}: dropped", ["", "neurons", "MLP bytes", "model bytes"], rows)
    if plan.ideal:
        known = (plan.realised or plan.predicted).model_bytes_frac
        output.line(f"{plan.method}: {RULER}; known beforehand they would leave {percent(known)} of model bytes unread")
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
    ppl = number(_value(dense["quality"], "ppl"))
    rows = [["dense", "0.0 %", ppl, "0.000", "100.0 %", milliseconds(ms), MISSING, MISSING, MISSING]]
    rows += [_plan_row(plan) for plan in document["plans"]]
    columns = ["plan", "model bytes", "perplexity", "KL", "top-1", "dense ms/token", "ms/token", "speed-up (95 %)",
               "ceiling"]  # fmt: skip
    output.table("Quality in the decode regime, and speed of real sparse decode", columns, rows)
    if any(plan["speed"] for plan in document["plans"]):
        output.line(TIMES)
    rulers = [plan for plan in document["plans"] if plan.get("ideal")]
    if rulers:
        known = ", ".join(f"{percent(one['sparsity']['model_bytes_frac'])} ({one['plan']})" for one in rulers)
        output.line(f"{RULER}; known beforehand they would leave unread {known}")
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
        [str(batch), str(prompt), str(gen), plan, *(number(one.get(metric)) for metric in THROUGHPUT.values())]
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
        _saved(plan["sparsity"]["model_bytes_frac"], ideal=plan.get("ideal", False)),
        number(_value(quality, "ppl")),
        number(_value(quality, "kl")),
        percent(_value(quality, "top1")),
        milliseconds(_value(speed, "dense_ms_per_token")),
        milliseconds(_value(speed, "ms_per_token")),
        speedup,
        f"{_value(speed, 'ceiling'):.2f}x" if speed else MISSING,
    ]


def _value(group: dict[str, Any] | None, name: str) -> float | None:
    return None if not group or name not in group else group[name]["value"]


def _saved(share: float | None, *, ideal: bool) -> str:
    """Bytes that a plan does not read; a ruler reads them all."""
    return "0.0 % (ruler)" if ideal else percent(share)
