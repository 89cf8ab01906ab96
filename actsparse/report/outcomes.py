"""What an evaluation found, plan by plan: one frozen record each, computed from the long results table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import polars as pl

from actsparse.report.plans import PlanName, Role, parse_plan
from actsparse.report.sources import Source
from actsparse.results import FEWEST_PAIRS, Verdict

BASES = ("model_bytes_frac", "mlp_bytes_frac", "neuron_frac", "channel_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval, standard error and sample size, each None where unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One plan of one evaluation. `realised`, `predicted` and `useful` hold shares by basis, `paired` the
    differences in NLL by reference."""

    letter: str
    name: PlanName
    label: str
    ppl: Estimate
    dense_ppl: Estimate
    paired: dict[str, Estimate]
    kl: Estimate
    top1: Estimate
    realised: dict[str, float]
    predicted: dict[str, float]
    useful: dict[str, float]
    ms_per_token: Estimate
    dense_ms: Estimate
    speedup: Estimate
    ceiling: float | None
    ttft_ms: float | None
    dense_ttft_ms: float | None
    break_even: float | None
    path_check: float | None
    speed_reason: str | None

    @property
    def increase(self) -> float | None:
        """Perplexity over the dense one, less 1."""
        if self.ppl.value is None or not self.dense_ppl.value:
            return None
        return self.ppl.value / self.dense_ppl.value - 1

    @property
    def verdict(self) -> Verdict | None:
        """What the interval of the speed-up allows to say; None where speed was not measured."""
        if self.speedup.value is None:
            return None
        if self.speedup.n is not None and self.speedup.n < FEWEST_PAIRS:
            return Verdict.NOT_SIGNIFICANT
        if self.speedup.low is not None and self.speedup.low > 1:
            return Verdict.FASTER
        if self.speedup.high is not None and self.speedup.high < 1:
            return Verdict.SLOWER
        return Verdict.NOT_SIGNIFICANT

    @property
    def reach(self) -> float | None:
        """The ceiling: as recorded, or from the bytes that the plan leaves unread; a ruler leaves none and has none."""
        if self.name.role is Role.ORACLE:
            return None
        share = self.realised.get("model_bytes_frac", self.predicted.get("model_bytes_frac"))
        if self.ceiling is not None or share is None or not 0 <= share < 1:
            return self.ceiling
        return 1 / (1 - share)


@dataclass(frozen=True)
class Lookup:
    """The rows of a results table by plan, metric and parameter."""

    rows: dict[tuple[str, str, str], Estimate]

    def get(self, plan: str, metric: str, param: str = "") -> Estimate:
        return self.rows.get((plan, metric, param), Estimate())

    def ranged(self, plan: str, metric: str, param: str = "") -> Estimate:
        """A metric with the interval that `<metric>_low` and `<metric>_high` hold."""
        middle = self.get(plan, metric, param)
        low, high = (self.get(plan, f"{metric}_{end}", param).value for end in ("low", "high"))
        if low == high:  # A bootstrap over one block or lap knows no spread.
            low = high = None
        return Estimate(value=middle.value, low=low, high=high, stderr=middle.stderr, n=middle.n)


def lookup(results: pl.DataFrame) -> Lookup:
    """A results table as a lookup."""
    columns = ("plan", "metric", "param", "value", "stderr", "n")
    return Lookup(
        {
            (plan, metric, param or ""): Estimate(value=value, stderr=stderr, n=n)
            for plan, metric, param, value, stderr, n in results.select(columns).iter_rows()
        }
    )


def outcomes_of(source: Source, fitted: Mapping[str, str] = MappingProxyType({})) -> tuple[Outcome, ...]:
    """Every plan of an evaluation in the order of its results, dense first.

    `fitted` are short forms of plan directories by their paths.
    """
    results = source.table("results")
    summary = {str(entry.get("plan")): entry for entry in source.summary().get("plans", []) if isinstance(entry, dict)}
    found = lookup(results)
    plans = list(dict.fromkeys(results["plan"].to_list()))
    plans.sort(key=lambda plan: plan != Role.DENSE)
    return tuple(_outcome(source.letter, plan, found, summary.get(plan, {}), fitted.get(plan)) for plan in plans)


def _outcome(letter: str, plan: str, found: Lookup, summary: dict[str, object], short: str | None) -> Outcome:
    reason = summary.get("speed_reason")
    name = parse_plan(plan, _text(summary.get("method")), short or _short(summary))
    return Outcome(
        letter=letter,
        name=name,
        label=name.short,
        ppl=found.ranged(plan, "ppl"),
        dense_ppl=found.ranged("dense", "ppl"),
        paired=_paired(plan, found),
        kl=found.ranged(plan, "kl"),
        top1=found.ranged(plan, "top1"),
        realised=_shares(plan, found, "realised"),
        predicted=_shares(plan, found, "predicted"),
        useful=_shares(plan, found, "useful"),
        ms_per_token=found.get(plan, "ms_per_token"),
        dense_ms=found.get("dense", "ms_per_token"),
        speedup=found.ranged(plan, "speedup"),
        ceiling=found.get(plan, "ceiling").value,
        ttft_ms=found.get(plan, "ttft_ms").value,
        dense_ttft_ms=_first(found.get("dense", "ttft_ms").value, found.get("dense", "prefill_ms").value),
        break_even=found.get(plan, "break_even_tokens").value,
        path_check=found.get(plan, "path_check").value,
        speed_reason=reason if isinstance(reason, str) else None,
    )


def _paired(plan: str, found: Lookup) -> dict[str, Estimate]:
    """Paired differences in NLL to other plans, by plan."""
    params = [param for name, metric, param in found.rows if name == plan and metric == "delta_nll"]
    return {param.removeprefix("reference="): found.ranged(plan, "delta_nll", param) for param in params}


def _shares(plan: str, found: Lookup, basis: str) -> dict[str, float]:
    shares = {metric: found.get(plan, metric, f"basis={basis}").value for metric in BASES}
    return {metric: share for metric, share in shares.items() if share is not None and math.isfinite(share)}


def _short(summary: dict[str, object]) -> str | None:
    """The short form of a plan from its method and what it was fitted to; None where the summary does not say it."""
    method, amount, target = (summary.get(key) for key in ("method", "amount", "target"))
    if not isinstance(method, str):
        return None
    if isinstance(target, str) and "=" in target:
        return f"{method}:{target}"
    return f"{method}@{amount:g}" if isinstance(amount, (int, float)) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
