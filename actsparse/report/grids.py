"""The tables of the page: every plan, the runs compared, the tokens that suffer most."""

from dataclasses import dataclass

import polars as pl

from actsparse.report.figures import cett
from actsparse.report.outcomes import Outcome
from actsparse.report.panels import EvalPanel, ProfilePanel
from actsparse.report.plans import Role
from actsparse.report.samples import WorstToken
from actsparse.report.verdicts import grade
from actsparse.report.wording import ABSENT, between, change, number, one_line, percent, shares_between, span, times


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    name: str
    unit: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What stands in a cell, a smaller second line, and the number that it sorts by (None: last)."""

    text: str
    detail: str = ""
    sort: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; `key` is the plan whose colour marks each row, if any."""

    id: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: tuple[str, ...] = ()


def plan_grid(panel: EvalPanel, place: int) -> Grid:
    """Every plan with its quality, sparsity and speed."""
    columns = (
        Column(name="plan", numeric=False),
        Column(name="perplexity"),
        Column(name="change"),
        Column(name="KL", unit="nats"),
        Column(name="same token"),
        Column(name="neurons", unit="dropped"),
        Column(name="bytes", unit="not read"),
        Column(name="speed-up"),
        Column(name="ceiling"),
        Column(name="decode", unit="ms a token"),
        Column(name="first token", unit="ms"),
    )
    return Grid(
        id=f"plans-{place}",
        title="Every plan" + (f", {panel.label}" if panel.label else ""),
        note="Intervals are bootstraps over blocks (perplexity) and over timing pairs (speed-up). Neurons and bytes "
        "(of the model, a decode step) are realised shares, counted on the scored text; a ruler needs what its masks "
        "would save, and saves nothing. "
        "A plan's dense time is that of the laps it was timed against in turns; the row of dense pools all laps. "
        "Time to first token includes selection and slicing, repaid after so many decoded tokens.",
        columns=columns,
        rows=tuple(_plan_row(outcome) for outcome in panel.outcomes),
        keys=tuple(outcome.label for outcome in panel.outcomes),
    )


def _plan_row(outcome: Outcome) -> tuple[Cell, ...]:
    dense = outcome.name.plan == "dense"
    neurons, channels = outcome.realised.get("neuron_frac"), outcome.realised.get("channel_frac")
    share = neurons if neurons is not None else channels
    judged = "" if outcome.name.role is Role.ORACLE else grade(outcome).value
    return (
        Cell(text=one_line(outcome.label)),
        _cell(outcome.ppl.value, number(outcome.ppl.value), span(outcome.ppl.low, outcome.ppl.high)),
        Cell(text=ABSENT) if dense else _cell(outcome.increase, change(outcome.increase), judged),
        _cell(outcome.kl.value, number(outcome.kl.value), span(outcome.kl.low, outcome.kl.high)),
        _cell(outcome.top1.value, percent(outcome.top1.value), shares_between(outcome.top1.low, outcome.top1.high)),
        _cell(share, percent(share), "channels" if neurons is None and channels is not None else ""),
        _unread(outcome),
        _cell(outcome.speedup.value, times(outcome.speedup.value), _speed_detail(outcome)),
        _cell(None if dense else outcome.reach, times(None if dense else outcome.reach)),
        _cell(outcome.ms_per_token.value, number(outcome.ms_per_token.value), _dense_detail(outcome)),
        _cell(_ttft(outcome), number(_ttft(outcome)), _repaid(outcome)),
    )


def _unread(outcome: Outcome) -> Cell:
    """The bytes that a plan does not read: of a ruler none, and what they would be if its masks were known before."""
    share = outcome.realised.get("model_bytes_frac")
    if outcome.name.role is not Role.ORACLE:
        return _cell(share, percent(share))
    return _cell(0.0, percent(0.0), f"ruler; known before: {percent(share)}")


def _speed_detail(outcome: Outcome) -> str:
    """The interval and the verdict word."""
    if outcome.verdict is None:
        return "" if outcome.name.role is Role.DENSE else "not timed"
    return " ".join(
        part for part in (between(outcome.speedup.low, outcome.speedup.high), outcome.verdict.value) if part
    )


def _dense_detail(outcome: Outcome) -> str:
    """The dense time of the very laps that a plan was timed against in turns."""
    if outcome.name.role is Role.DENSE or outcome.ms_per_token.value is None or outcome.dense_ms.value is None:
        return ""
    return f"dense {number(outcome.dense_ms.value)}"


def _repaid(outcome: Outcome) -> str:
    """After how many decoded tokens selection and slicing are won back."""
    if outcome.ttft_ms is None or outcome.name.role is Role.DENSE:
        return ""
    if outcome.break_even is None:
        return "never repaid"
    return f"repaid after {number(outcome.break_even, 2)}" if outcome.break_even > 0 else "nothing to repay"


def _ttft(outcome: Outcome) -> float | None:
    return outcome.dense_ttft_ms if outcome.name.plan == "dense" else outcome.ttft_ms


def worst_grid(tokens: tuple[WorstToken, ...], place: int, label: str, *, decoded: bool) -> Grid:
    """The tokens whose loss rises most."""
    names = "text" if decoded else "ids"
    return Grid(
        id=f"worst-{place}",
        title="Tokens that suffer most" + (f", {label}" if label else ""),
        note="The scored tokens whose negative log-likelihood rises most over dense, with the tokens before them"
        + ("." if decoded else "; the runs hold token ids, not their text."),
        columns=(
            Column(name="plan", numeric=False),
            Column(name="loss added", unit="nats"),
            Column(name="KL", unit="nats"),
            Column(name="block"),
            Column(name="position"),
            Column(name=f"tokens before ({names})", numeric=False),
            Column(name="token", numeric=False),
        ),
        rows=tuple(
            (
                Cell(text=one_line(token.plan)),
                _cell(token.delta_nll, f"+{number(token.delta_nll)}"),
                _cell(token.kl, number(token.kl)),
                _cell(token.block, str(token.block)),
                _cell(token.position, str(token.position)),
                Cell(text=token.before),
                Cell(text=token.token),
            )
            for token in tokens
        ),
        keys=tuple(token.plan for token in tokens),
    )


def compare_grid(profiles: tuple[ProfilePanel, ...], evals: tuple[EvalPanel, ...]) -> Grid | None:
    """Headline numbers of the runs beside each other, with the change to the first; None for a single run of a kind."""
    if len(profiles) < 2 and len(evals) < 2:
        return None
    profiles, evals = profiles if len(profiles) > 1 else (), evals if len(evals) > 1 else ()
    labels = list(dict.fromkeys([panel.label for panel in (*profiles, *evals)]))
    rows = [*_profile_rows(profiles, labels), *_eval_rows(evals, labels)]
    columns = (Column(name="measured", numeric=False), *(Column(name=one_line(label)) for label in labels))
    note = (
        f"The first column of numbers ({labels[0]}) is the reference. Perplexities of models with different "
        "tokenizers do not compare; their ratios to dense do."
    )
    return Grid(id="compare", title="Runs side by side", note=note, columns=columns, rows=tuple(rows))


def _profile_rows(panels: tuple[ProfilePanel, ...], labels: list[str]) -> list[tuple[Cell, ...]]:
    if not panels:
        return []
    found: dict[str, dict[str, float]] = {}
    for panel in panels:
        frame = cett.layers(panel)
        for target, mean in frame.group_by("target", maintain_order=True).agg(pl.col("sparsity").mean()).iter_rows():
            found.setdefault(f"CETT sparsity at {target:g}, mean over layers", {})[panel.label] = mean
        for metric, name in _MEANS.items():
            mean = panel.measures.filter((pl.col("metric") == metric) & pl.col("layer").is_not_null())["value"].mean()
            if isinstance(mean, float):
                found.setdefault(name, {})[panel.label] = mean
    return [_compared(name, values, labels, points=True) for name, values in found.items()]


_MEANS = {
    "zero_frac": "exact zeros, mean over layers and kinds",
    "hot_frac": "hot neurons",
    "dead_frac": "dead neurons",
}


def _eval_rows(panels: tuple[EvalPanel, ...], labels: list[str]) -> list[tuple[Cell, ...]]:
    rows: dict[str, dict[str, float]] = {}
    for panel in panels:
        for outcome in panel.compared:
            if outcome.increase is not None:
                rows.setdefault(f"{outcome.label}: perplexity over dense", {})[panel.label] = outcome.increase + 1
            if outcome.speedup.value is not None:
                rows.setdefault(f"{outcome.label}: speed-up", {})[panel.label] = outcome.speedup.value
    return [_compared(name, values, labels, points=False) for name, values in rows.items() if len(values) > 1]


def _compared(name: str, values: dict[str, float], labels: list[str], *, points: bool) -> tuple[Cell, ...]:
    reference = values.get(labels[0])
    cells = [Cell(text=one_line(name))]
    for label in labels:
        value = values.get(label)
        if value is None:
            cells.append(Cell(text=ABSENT))
            continue
        moved = ""
        if reference is not None and label != labels[0]:
            moved = (
                f"{percent(value - reference, signed=True)[:-2]} points"
                if points
                else f"{percent(value / reference - 1, signed=True)}"
            )
        cells.append(_cell(value, percent(value) if points else times(value), moved))
    return tuple(cells)


def _cell(value: float | None, text: str, detail: str = "") -> Cell:
    return Cell(text=text, detail=detail, sort=value)
