"""At most six cards: dense to sparse, the change, the interval."""

from dataclasses import dataclass

import polars as pl

from actsparse.report.figures import cett
from actsparse.report.outcomes import Outcome
from actsparse.report.panels import EvalPanel, ProfilePanel
from actsparse.report.plans import Role
from actsparse.report.verdicts import best_usable, grade, headline, title_of
from actsparse.report.wording import (
    ABSENT,
    between,
    change,
    milliseconds,
    number,
    one_line,
    percent,
    shares_between,
    span,
    times,
)

MOST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A headline number: what, of which plan or model, dense and sparse, the change, and a note on certainty."""

    title: str
    subject: str
    before: str
    value: str
    change: str
    note: str
    tone: str = ""


def headline_text(evals: tuple[EvalPanel, ...]) -> str:
    """Which plan the cards show, and why that one."""
    if not evals or (outcome := headline(list(evals[0].compared))) is None:
        return ""
    if best_usable(list(evals[0].compared)) is outcome:
        why = "The fastest plan within +5\u202f%"
    elif outcome.name.role is not Role.METHOD:
        why = "The plan that loses least"
    else:
        why = (
            "The method that loses least of those timed"
            if outcome.verdict
            else "The method that loses least, not timed"
        )
    return f"{why}: {title_of(outcome)}"


def cards(evals: tuple[EvalPanel, ...], profiles: tuple[ProfilePanel, ...]) -> tuple[Card, ...]:
    """Cards of the reference evaluation's headline plan, then of the profiles."""
    found: list[Card | None] = []
    if evals and (outcome := headline(list(evals[0].compared))):
        found += [_speed(outcome), _quality(outcome), _agreement(outcome), _bytes(outcome), _first_token(outcome)]
    for panel in profiles:
        found += [_cett(panel), *([] if evals else [_hot(panel)])]
    return tuple(card for card in found if card is not None)[:MOST]


def _speed(outcome: Outcome) -> Card | None:
    if outcome.verdict is None:
        return None
    ceiling = f"ceiling {times(outcome.reach)}" if outcome.reach is not None else ""
    interval = between(outcome.speedup.low, outcome.speedup.high)
    return Card(
        title="Decode, time a token",
        subject=one_line(outcome.label),
        before=milliseconds(outcome.dense_ms.value),
        value=milliseconds(outcome.ms_per_token.value),
        change=f"{times(outcome.speedup.value)}, {outcome.verdict}",
        note=", ".join(part for part in (interval, ceiling) if part),
        tone="good" if outcome.verdict == "faster" else "bad" if outcome.verdict == "slower" else "",
    )


def _quality(outcome: Outcome) -> Card | None:
    if outcome.ppl.value is None:
        return None
    interval = span(outcome.ppl.low, outcome.ppl.high)
    count = f"n = {outcome.ppl.n} tokens" if outcome.ppl.n else ""
    judged = grade(outcome)
    return Card(
        title="Perplexity",
        subject=one_line(outcome.label),
        before=number(outcome.dense_ppl.value),
        value=number(outcome.ppl.value),
        change=f"{change(outcome.increase)}, {judged}" if outcome.increase is not None else "",
        note=", ".join(part for part in (interval, count) if part),
        tone={"NEUTRAL": "good", "USABLE": "good", "UNUSABLE": "bad"}.get(judged.name, ""),
    )


def _agreement(outcome: Outcome) -> Card | None:
    if outcome.top1.value is None:
        return None
    kl = f"KL {number(outcome.kl.value)} nats a token" if outcome.kl.value is not None else ""
    interval = shares_between(outcome.top1.low, outcome.top1.high)
    return Card(
        title="Same next token as dense",
        subject=one_line(outcome.label),
        before="",
        value=percent(outcome.top1.value),
        change=kl,
        note=interval,
    )


def _bytes(outcome: Outcome) -> Card | None:
    share = outcome.realised.get("model_bytes_frac", outcome.predicted.get("model_bytes_frac"))
    if share is None or outcome.name.role is Role.ORACLE:
        return None
    neurons = outcome.realised.get("neuron_frac")
    predicted = outcome.predicted.get("model_bytes_frac")
    return Card(
        title="Weight bytes not read a token",
        subject=one_line(outcome.label),
        before="",
        value=percent(share),
        change=f"{percent(neurons)} of neurons" if neurons is not None else "",
        note=f"predicted {percent(predicted)}" if predicted is not None else "",
    )


def _repaid(outcome: Outcome) -> str:
    if outcome.break_even is None:
        return "never repaid"
    return f"repaid after {number(outcome.break_even, 2)} tokens" if outcome.break_even > 0 else "nothing to repay"


def _first_token(outcome: Outcome) -> Card | None:
    if outcome.ttft_ms is None:
        return None
    return Card(
        title="Time to first token",
        subject=one_line(outcome.label),
        before=milliseconds(outcome.dense_ttft_ms) if outcome.dense_ttft_ms is not None else "",
        value=milliseconds(outcome.ttft_ms),
        change=_repaid(outcome),
        note="selection and slicing included",
    )


def _cett(panel: ProfilePanel) -> Card | None:
    frame = cett.layers(panel)
    if frame.is_empty():
        return None
    targets = frame["target"].unique().sort().to_list()
    target = 0.2 if 0.2 in targets else targets[len(targets) // 2]
    rows = frame.filter(pl.col("target") == target)["sparsity"]
    low, high = rows.min(), rows.max()
    return Card(
        title=f"CETT sparsity at {target:g}",
        subject=panel.source.model_name,
        before="",
        value=percent(_mean(rows)),
        change=f"{_percent(low)} to {_percent(high)} by layer",
        note=f"mean of {rows.len()} layer{'s' * (rows.len() > 1)}",
    )


def _hot(panel: ProfilePanel) -> Card | None:
    means = {
        metric: panel.measures.filter((pl.col("metric") == metric) & pl.col("layer").is_not_null())["value"].mean()
        for metric in ("hot_frac", "dead_frac", "neuron_gini")
    }
    if means["hot_frac"] is None:
        return None
    gini = means["neuron_gini"]
    return Card(
        title="Hot and dead neurons",
        subject=panel.source.model_name,
        before="",
        value=f"{_percent(means['hot_frac'])} / {_percent(means['dead_frac'])}",
        change=f"Gini {gini:.2f}" if isinstance(gini, float) else "",
        note="active in over half / under 0.1 % of tokens",
    )


def _mean(values: pl.Series) -> float | None:
    mean = values.mean()
    return mean if isinstance(mean, float) else None


def _percent(value: object) -> str:
    return percent(value) if isinstance(value, float) else ABSENT
