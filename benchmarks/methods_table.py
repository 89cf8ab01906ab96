"""Make docs/methods/results.md: every method at equal bytes of the model, beside its control, and auto beside them.

    python benchmarks/methods_table.py --model smollm2 --corpus wikitext2-test.txt -o docs/methods/results.md

Shares follow in closed form from the byte model, so that plans of one table predict the same `model_bytes_frac`.
Both evaluations are runs like any other: they resume, and are kept under --runs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from actsparse.core.cost import LayerDrops, saved
from actsparse.core.masks import kept_count
from actsparse.methods.base import Method
from actsparse.methods.channels import ChannelMethod
from actsparse.methods.gates import Threshold, TokenGate
from actsparse.methods.larosa import LaRoSA
from actsparse.methods.registry import all_methods
from actsparse.methods.rsparse import RSparse
from actsparse.methods.short import parse
from actsparse.models.load import load
from actsparse.models.sites import ModelSites, dense_linears
from actsparse.pipelines.evaluate import evaluate
from actsparse.results import SiteKind, StepBytes, param
from actsparse.specs import DataSpec, EvalSpec, ModelSpec
from actsparse.store.runs import EvalRun

TABLE = (0.25, 0.4)
BUDGETS = (0.1, 0.2, 0.3, 0.4)
METHODS = (
    "random", "static", "static:stat=griffin", "griffin", "tda", "coreinfer", "cats", "chess", "countdown", "cett",
    "teal", "wina", "rsparse", "larosa", "auto", "oracle-n",
)  # fmt: skip
SINGLE = ("teal", "wina", "cats")
LARGEST = 0.95
NEURON_NOISE, CHANNEL_NOISE, SEQUENCE_NOISE = 0.03, 0.08, 0.001
CONTROL_OF = {"griffin": "static:stat=griffin", "tda": "static:stat=griffin", "coreinfer": "static"}
PUBLISHED = (
    ("griffin", "static:stat=griffin", "a mask of the own prompt is better than one for all text"),
    ("griffin", "static", "GRIFFIN is better than static pruning by mean output norm"),
    ("chess", "cats", "CHESS, a threshold a neuron, is better than CATS"),
    ("countdown", "cats", "COUNTDOWN is better than CATS"),
    ("wina", "teal", "WINA, with column norms, is better than TEAL"),
    ("rsparse", "teal", "R-Sparse, with a low-rank part, is better than TEAL"),
    ("larosa", "teal", "LaRoSA, in a rotated basis, is better than TEAL"),
    ("teal", "cats", "TEAL is better than CATS at equal bytes"),
)
"""Orderings that the papers of the first method report: the first is better than the second."""


@dataclass(frozen=True)
class Row:
    """One plan of a table."""

    name: str
    plan: str
    ppl: float
    low: float
    high: float
    kl: float
    top1: float
    realised: float
    error: float


def main() -> None:
    asked = _arguments()
    loaded = load(ModelSpec(name=asked.model), print)
    step, sites = loaded.record.step, loaded.sites
    table = {target: plans_at(target, METHODS, step, sites, loaded.record.gated) for target in TABLE}
    budgets = {target: plans_at(target, ("auto", *SINGLE), step, sites, loaded.record.gated) for target in BUDGETS}
    sections = []
    if "table" in asked.parts:
        run = _evaluate(asked, "table", [plan for plans in table.values() for plan in plans.values()])
        sections += [table_section(run, target, plans) for target, plans in table.items()]
        sections += [control_section(run, table), ordering_section(run, table)]
    if "auto" in asked.parts:
        run = _evaluate(asked, "auto", [plan for plans in budgets.values() for plan in plans.values()])
        sections.append(auto_section(run, budgets))
    asked.output.write_text("\n\n".join([heading(asked), *sections]) + "\n")
    print(asked.output)


def plans_at(target: float, names: Sequence[str], step: StepBytes, sites: ModelSites, gated: bool) -> dict[str, str]:
    """The plan of each method that predicts not to read `target` of the model's bytes, where one can."""
    found = {}
    for name in names:
        method = parse(f"{name}@0.5").method
        if method.gated_only and not gated:
            continue
        if name == "auto":
            found[name] = f"auto@{target:g}"
            continue
        share = (target * step.total + adapter_bytes(method, sites)) / (whole_share(method, step, gated) * step.total)
        if share <= LARGEST:
            found[name] = f"{name}@{share:.4f}"
    return found


def whole_share(method: Method, step: StepBytes, gated: bool) -> float:
    """The share of the model's bytes that is not read when a method drops everything, adapters apart."""
    if isinstance(method, ChannelMethod | LaRoSA):
        sizes = step.mlp | step.projections
        return step.layers * sum(sizes.values()) / step.total
    reads = SiteKind.NEURON if method.name == "cett" else method.needs[0]
    token = TokenGate(reads, Threshold(0.0), saves=method.saves, ideal=method.ideal)
    by_token = method.decides.value == "per token"
    saves = token.unread(gated) if by_token else method.saves
    return saved(step, [LayerDrops(neurons=1.0, neuron_saves=saves)] * step.layers).model_bytes_frac


def adapter_bytes(method: Method, sites: ModelSites) -> int:
    """What the low-rank parts of R-Sparse and the rotations of LaRoSA read for a token."""
    linears, layers = dense_linears(sites), len(sites.layers)
    size = sites.model.dtype.itemsize
    if isinstance(method, RSparse):
        shapes = [one.matrix().shape for one in linears.values()]
        return layers * size * sum(kept_count(method.rank_frac, min(shape)) * sum(shape) for shape in shapes)
    if isinstance(method, LaRoSA):
        return layers * size * 2 * next(iter(linears.values())).width ** 2
    return 0


def rows_of(run: EvalRun, plans: dict[str, str]) -> list[Row]:
    """The rows of one table, the best first."""
    rows = []
    for name, plan in plans.items():
        mine = run.results.filter(plan=plan)
        errors = mine.filter(metric="rel_err")["value"].mean()
        rows.append(
            Row(
                name,
                plan,
                *(_value(mine, metric) for metric in ("ppl", "ppl_low", "ppl_high", "kl", "top1")),
                _value(mine, "model_bytes_frac", param(basis="realised")),
                float(errors) if isinstance(errors, float) else float("nan"),
            )
        )
    return sorted(rows, key=lambda row: row.ppl)


def table_section(run: EvalRun, target: float, plans: dict[str, str]) -> str:
    """All methods at one budget."""
    head = [
        f"## {target:.0%} of the model's bytes",
        "",
        "| plan | perplexity | interval | KL (nats) | top-1 | bytes not read (realised) | local error |",
        "|---|---|---|---|---|---|---|",
    ]
    body = [
        f"| `{row.plan}`{' (ruler)' if all_methods()[row.name.partition(':')[0]].ideal else ''} | {row.ppl:.4g} |"
        f" {row.low:.4g} to {row.high:.4g} | {row.kl:.3g} | {row.top1:.1%} | {row.realised:.1%} | {row.error:.3f} |"
        for row in rows_of(run, plans)
    ]
    missed = [name for name in METHODS if name not in plans]
    note = f"\nNot reachable at this budget: {', '.join(f'`{name}`' for name in missed)}." if missed else ""
    return "\n".join([*head, *body]) + (f"\n{note}" if note else "")


def control_section(run: EvalRun, table: dict[float, dict[str, str]]) -> str:
    """Every prompt method beside the static mask by its own statistic."""
    lines = [
        "## Prompt methods beside their controls",
        "",
        "The same statistic, once of the own prompt and once of all calibration text. A difference below 0 would say"
        " that the own prompt is better (nats per token, paired over blocks).",
        "",
        "| budget | prompt method | control | difference | interval |",
        "|---|---|---|---|---|",
    ]
    for target, plans in table.items():
        for name, control in CONTROL_OF.items():
            if name in plans and control in plans:
                value, low, high = difference(run, plans[name], plans[control])
                lines.append(
                    f"| {target:.0%} | `{plans[name]}` | `{plans[control]}` | {value:+.3f} |"
                    f" {low:+.3f} to {high:+.3f} |"
                )
    return "\n".join(lines)


def ordering_section(run: EvalRun, table: dict[float, dict[str, str]]) -> str:
    """Published orderings, and whether they hold here."""
    lines = [
        "## Published orderings on this model",
        "",
        "Differences of NLL (first less second, nats per token). Two right runs of one per-token rule may differ by"
        f" {NEURON_NOISE} (neurons) or {CHANNEL_NOISE} (channels): smaller differences are no claim.",
        "",
        "| budget | claim | difference | interval | local errors | here |",
        "|---|---|---|---|---|---|",
    ]
    for target, plans in table.items():
        errors = {row.name: row.error for row in rows_of(run, plans)}
        for better, worse, claim in PUBLISHED:
            if better in plans and worse in plans:
                value, low, high = difference(run, plans[better], plans[worse])
                noise = max(_noise(better), _noise(worse))
                lines.append(
                    f"| {target:.0%} | {claim} | {value:+.3f} | {low:+.3f} to {high:+.3f} |"
                    f" {errors[better]:.3f}, {errors[worse]:.3f} | {verdict(value, low, high, noise)} |"
                )
    return "\n".join(lines)


def verdict(value: float, low: float, high: float, noise: float) -> str:
    """Whether a first method's NLL is below a second's, beyond rounding and sampling."""
    if abs(value) <= noise:
        return "within noise"
    if value < 0:
        return "holds" if high < 0 else "not significant"
    return "**does not hold**" if low > 0 else "not significant"


def auto_section(run: EvalRun, budgets: dict[float, dict[str, str]]) -> str:
    """auto beside the best single method, and what it chose."""
    lines = [
        "## auto beside the best single method",
        "",
        f"Its bar: no worse than the best of {', '.join(f'`{one}`' for one in SINGLE)} by more than"
        f" {CHANNEL_NOISE} nats per token, on text that nothing was fitted on.",
        "",
        "| budget | auto | best single method | difference (nats) | interval | bar |",
        "|---|---|---|---|---|---|",
    ]
    for target, plans in budgets.items():
        rows = rows_of(run, plans)
        auto = next(row for row in rows if row.name == "auto")
        best = next(row for row in rows if row.name != "auto")
        value, low, high = difference(run, auto.plan, best.plan)
        lines.append(
            f"| {target:.0%} | {auto.ppl:.4g} | `{best.plan}` {best.ppl:.4g} | {value:+.3f} | {low:+.3f} to {high:+.3f}"
            f" | {'met' if value <= CHANNEL_NOISE else '**missed**'} |"
        )
    return "\n".join(lines)


def difference(run: EvalRun, plan: str, reference: str) -> tuple[float, float, float]:
    """The paired difference in NLL with its interval."""
    mine, where = run.results.filter(plan=plan), param(reference=reference)
    found = [_value(mine, metric, where) for metric in ("delta_nll", "delta_nll_low", "delta_nll_high")]
    return found[0], found[1], found[2]


def heading(asked: argparse.Namespace) -> str:
    """What was measured and how to repeat it."""
    command = (
        f"python benchmarks/methods_table.py --model {asked.model} --corpus {Path(asked.corpus).name} -n {asked.n}"
    )
    return (
        f"# Results: methods at equal bytes on {asked.model}\n\n"
        f"Made by `{command}`. Decode regime ([metrics](../metrics.md)): the first {asked.n} blocks of 512 tokens,"
        f" prompts of 256 tokens dense, calibration on the next {asked.n} blocks. Perplexity with its 95 % interval"
        " over blocks; *local error* is the mean relative error of a projection's (or the MLP's) output on dense"
        " inputs, comparable among methods over the same units alone. `random` is the mean of three seeds. A *ruler*"
        " needs what it saves."
    )


def _noise(name: str) -> float:
    method = parse(f"{name}@0.5").method
    if isinstance(method, ChannelMethod | LaRoSA):
        return CHANNEL_NOISE
    return NEURON_NOISE if method.decides.value == "per token" else SEQUENCE_NOISE


def _value(rows: pl.DataFrame, metric: str, where: str = "") -> float:
    found = rows.filter(metric=metric, param=where)["value"]
    return float(found[0]) if len(found) and found[0] is not None else float("nan")


def _evaluate(asked: argparse.Namespace, part: str, plans: list[str]) -> EvalRun:
    spec = EvalSpec(
        model=ModelSpec(name=asked.model),
        data=DataSpec(corpus=asked.corpus, limit=asked.n),
        plans=tuple(dict.fromkeys(plans)),
        controls=False,
        generations=0,
        timing_pairs=0,
        output=asked.runs / f"methods-{part}-{asked.n}",
    )
    return evaluate(spec)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=("table", "auto"), default=["table", "auto"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/methods/results.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
