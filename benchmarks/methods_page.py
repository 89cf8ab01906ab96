"""The sections of docs/methods/results.md, from finished evaluations of the same blocks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from methods_budgets import Entry

from actsparse.core.bootstrap import bootstrap_ratio
from actsparse.methods.channels import ChannelMethod
from actsparse.methods.larosa import LaRoSA
from actsparse.methods.registry import all_methods
from actsparse.methods.short import parse
from actsparse.results import Unit, param
from actsparse.store.runs import EvalRun

NEURON_NOISE, CHANNEL_NOISE, SEQUENCE_NOISE = 0.03, 0.08, 0.001
ROUTER = "dejavu:input=sequential"
PUBLISHED = (
    ("griffin", "static:stat=griffin", "GRIFFIN: a mask of the own prompt is better than one for all text"),
    ("griffin", "static", "GRIFFIN is better than static pruning by mean output norm"),
    ("tda", "static:stat=griffin", "TDA: a threshold on the own prompt is better than one mask for all text"),
    ("coreinfer", "static:stat=coreinfer", "CoreInfer: the prompt's core neurons are better than one set for all text"),
    ("chess", "cats", "CHESS, a threshold a neuron, is better than CATS"),
    ("countdown", "cats", "COUNTDOWN is better than CATS"),
    ("wina", "teal", "WINA, with column norms, is better than TEAL"),
    ("rsparse", "teal", "R-Sparse, with a low-rank part, is better than TEAL"),
    ("larosa", "teal", "LaRoSA, in a rotated basis, is better than TEAL"),
    ("teal", "cats", "TEAL is better than CATS at equal bytes"),
    ("teal:allocation=greedy", "teal", "TEAL's greedy shares are better than equal ones"),
    (ROUTER, "static", "Deja Vu: a trained router is better than one mask for all text"),
    ("moefication:router=mlp", "moefication:router=centroid", "MoE-fication: a trained router is better than cosine"),
)
"""Orderings that the papers of the first method report or rest on: the first is better than the second."""

Tables = Mapping[float, Sequence[Entry]]


@dataclass(frozen=True)
class Row:
    """One plan of a table; nan where a number was not measured."""

    entry: Entry
    ppl: float
    low: float
    high: float
    kl: float
    top1: float
    realised: float
    error: float

    @property
    def told(self) -> str:
        """A line of a table."""
        ideal = _ideal(self.entry)
        error = "-" if self.error != self.error else f"{self.error:.3f}"
        return (
            f"| `{self.entry.shown}`{' (ruler)' if ideal else ''} | {self.ppl:.4g} | {self.low:.4g} to {self.high:.4g}"
            f" | {self.kl:.3g} | {self.top1:.1%} | {self.realised:.1%} | {error} |"
        )


UNEQUAL = 0.005
"""Realised shares of the model's bytes that differ by more are no comparison at equal bytes."""
APART = "unequal bytes"
UNCOUNTED = f"are at {APART} (realised shares over half a point apart, the first's less the second's) and not counted"
HEAD = [
    "| plan | perplexity | interval | KL (nats) | top-1 | bytes not read (realised) | local error |",
    "|---|---|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Difference:
    """NLL of a first plan less a second's, nats per token, paired over blocks; and by how much the first's realised
    share of bytes not read is larger."""

    value: float
    low: float
    high: float
    bytes_apart: float = 0.0

    @property
    def told(self) -> str:
        """As two cells of a table."""
        return f"{self.value:+.3f} | {self.low:+.3f} to {self.high:+.3f}"

    def verdict(self, noise: float) -> str:
        """Whether the first is better, beyond rounding and sampling; no verdict at unequal bytes."""
        if abs(self.bytes_apart) > UNEQUAL:
            return f"{APART} ({100 * self.bytes_apart:+.1f} points)"
        if abs(self.value) <= noise:
            return "within noise"
        if self.value < 0:
            return "holds" if self.high < 0 else "not significant"
        return "**does not hold**" if self.low > 0 else "not significant"


@dataclass(frozen=True)
class Book:
    """Finished evaluations; all scored the same blocks."""

    runs: Sequence[EvalRun]

    def has(self, entry: Entry) -> bool:
        """Whether a plan was measured."""
        return self._run(entry) is not None

    def rows(self, entries: Sequence[Entry]) -> list[Row]:
        """The rows of plans that were measured, the best first."""
        return sorted((self.row(one) for one in entries if self.has(one)), key=lambda row: row.ppl)

    def row(self, entry: Entry) -> Row:
        """What was measured of a plan."""
        run = self._run(entry)
        assert run is not None
        mine = run.results.filter(plan=entry.plan)
        errors = mine.filter(metric="rel_err")["value"].mean()
        return Row(
            entry,
            *(_value(mine, metric) for metric in ("ppl", "ppl_low", "ppl_high", "kl", "top1")),
            _value(mine, "model_bytes_frac", param(basis="realised")),
            float(errors) if isinstance(errors, float) else float("nan"),
        )

    def difference(self, first: Entry, second: Entry) -> Difference:
        """The paired difference with its interval by bootstrap over blocks."""
        pair = self._nll(first).join(self._nll(second), on=["block", "position"], suffix="_other")
        sums = (
            pair.group_by("block")
            .agg((pl.col("nll") - pl.col("nll_other")).sum().alias("sum"), pl.len().cast(pl.Float64).alias("count"))
            .sort("block")
        )
        found = bootstrap_ratio(*(torch.from_numpy(sums[name].to_numpy().copy()) for name in ("sum", "count")))
        assert found.value is not None
        low, high = (found.value if end is None else end for end in (found.low, found.high))
        return Difference(found.value, low, high, self.row(first).realised - self.row(second).realised)

    def dropped(self, entry: Entry) -> pl.DataFrame:
        """The realised share that a plan drops, by layer and unit (columns layer, unit, share)."""
        run = self._run(entry)
        assert run is not None
        rows = run.results.filter(plan=entry.plan, metric="kept_frac")
        part = pl.col("param").str.extract
        return rows.select(
            part(r"layer=(\d+)").cast(pl.Int64).alias("layer"),
            part(r"(?:proj|unit)=([a-z_]+)").fill_null(Unit.NEURON.value).alias("unit"),
            (1 - pl.col("value")).alias("share"),
        )

    def _nll(self, entry: Entry) -> pl.DataFrame:
        run = self._run(entry)
        assert run is not None
        return run.tokens.filter(plan=entry.plan).group_by("block", "position").agg(pl.col("nll").mean())

    def _run(self, entry: Entry) -> EvalRun | None:
        return next((run for run in self.runs if len(run.results.filter(plan=entry.plan))), None)


def budget_section(book: Book, target: float, entries: Sequence[Entry], missed: Sequence[str]) -> str:
    """All methods at one budget; like every section, empty where nothing of it was measured."""
    rows = [row.told for row in book.rows(entries)]
    if not rows:
        return ""
    note = ["", f"Not reachable at this budget: {', '.join(f'`{name}`' for name in missed)}."] if missed else []
    return "\n".join([f"## {target:.0%} of the model's bytes", "", *HEAD, *rows, *note])


def heads_section(book: Book, entries: Sequence[Entry]) -> str:
    """Methods over heads, whose projections are too few bytes for the budgets above."""
    text = (
        "The rows of q and the columns of o that a dropped KV group saves are too few bytes for the budgets above."
        " These are the methods at about half of the groups and at all but one (the first layer stays dense; what the"
        " KV cache saves is not counted)."
    )
    rows = [row.told for row in book.rows(entries)]
    return "\n".join(["## Heads", "", text, "", *HEAD, *rows]) if rows else ""


def control_section(book: Book, tables: Tables) -> str:
    """Every prompt method beside the static mask by its own statistic."""
    lines, tally = [], Counter[str]()
    for target, entries in tables.items():
        by_label = {one.label: one for one in entries if book.has(one)}
        for entry in by_label.values():
            method = parse(entry.label + "@0.5").method
            control = by_label.get(method.control or "")
            if control is None or isinstance(method, ChannelMethod):
                continue
            found = book.difference(entry, control)
            verdict = found.verdict(SEQUENCE_NOISE)
            tally[verdict] += 1
            better = {"holds": "own prompt", "**does not hold**": "static"}.get(
                verdict, verdict if APART in verdict else "neither"
            )
            lines.append(f"| {target:.0%} | `{entry.shown}` | `{control.shown}` | {found.told} | {better} |")
    if not lines:
        return ""
    told = (
        f"Of {tally.total()} comparisons the own prompt is better in {tally['holds']}, one mask for all text in"
        f" {tally['**does not hold**']}; {_apart(tally.elements())} {UNCOUNTED}; in the others the interval holds 0."
    )
    return "\n".join([
        "## Prompt methods beside their controls",
        "",
        "The same statistic, once of the own prompt and once of all calibration text. A difference below 0 says that"
        f" the own prompt is better (nats per token, paired over blocks). {told}",
        "",
        "| budget | prompt method | control | difference | interval | better |",
        "|---|---|---|---|---|---|",
        *lines,
    ])  # fmt: skip


def ordering_section(book: Book, tables: Tables) -> str:
    """Published orderings, and whether they hold here, with the numbers in words for those that do not."""
    lines, against, verdicts = [], [], []
    for target, entries in tables.items():
        by_label = {one.label: one for one in entries if book.has(one)}
        for better, worse, claim in PUBLISHED:
            if better not in by_label or worse not in by_label:
                continue
            found, noise = book.difference(by_label[better], by_label[worse]), max(_noise(better), _noise(worse))
            errors = [book.row(by_label[name]).error for name in (better, worse)]
            verdict = found.verdict(noise)
            verdicts.append(verdict)
            lines.append(
                f"| {target:.0%} | {claim} | {found.told} | {errors[0]:.3f}, {errors[1]:.3f} | {noise:g} | {verdict} |"
            )
            if verdict == "**does not hold**":
                against.append(
                    f'- At {target:.0%}, "{claim}" does not hold: `{better}` is {found.value:.3f} nats worse'
                    f" [{found.low:.3f}, {found.high:.3f}] than `{worse}`, over the noise of {noise:g}; local errors"
                    f" {errors[0]:.3f} against {errors[1]:.3f}{_same_way(better, worse, errors)}."
                )
    if not lines:
        return ""
    told = (
        f"Of {len(verdicts)} comparisons {verdicts.count('holds')} hold, {verdicts.count('**does not hold**')} do not,"
        f" {verdicts.count('within noise')} are within the noise, {verdicts.count('not significant')} have an interval"
        f" that holds 0, {_apart(verdicts)} {UNCOUNTED}."
    )
    return "\n".join([
        "## Published orderings on this model",
        "",
        "Differences of NLL (first less second, nats per token). Two right float32 runs of one per-token rule may"
        f" differ by {NEURON_NOISE} (neurons) or {CHANNEL_NOISE} (channels), masks of a sequence by {SEQUENCE_NOISE}: a"
        f" difference that is not larger than the noise of both is no claim, nor one whose interval holds 0. {told}",
        "",
        *against,
        *([""] if against else []),
        "| budget | claim | difference | interval | local errors | noise | here |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ])  # fmt: skip


def _apart(verdicts: Iterable[str]) -> int:
    """How many comparisons are at unequal bytes."""
    return sum(APART in one for one in verdicts)


def _same_way(better: str, worse: str, errors: Sequence[float]) -> str:
    """Whether local errors, where they can be compared, say the same as the loss."""
    if _channels(better) != _channels(worse):
        return " (of other units, not comparable)"
    return ", which says the same" if errors[0] > errors[1] else ", which alone would say the opposite"


def allocation_section(book: Book, tables: Tables, equal: Tables) -> str:
    """Plans that share a budget out unequally, beside the same method with equal shares."""
    lines, gains = [], []
    for target, entries in tables.items():
        uniform = {one.label: one for one in equal.get(target, ()) if book.has(one)}
        for entry in entries:
            label, kind = _without_allocation(entry.label)
            if not book.has(entry) or label not in uniform:
                continue
            found, noise = book.difference(entry, uniform[label]), _noise(label)
            verdict = {"holds": "better", "**does not hold**": "worse"}.get(found.verdict(noise), found.verdict(noise))
            gains.append((found.value, verdict, f"`{entry.shown}`", target))
            ppl = [book.row(one).ppl for one in (uniform[label], entry)]
            lines.append(
                f"| {target:.0%} | `{uniform[label].shown}` | {ppl[0]:.4g} | {kind} | {ppl[1]:.4g} | {found.told} |"
                f" {verdict} |"
            )
    if not gains:
        return ""
    fair = [one for one in gains if APART not in one[1]]
    best = min(fair, default=None)
    told = (
        f" {sum(verdict == 'better' for _, verdict, _, _ in gains)} of {len(gains)} are better beyond the noise,"
        f" {sum(verdict == 'worse' for _, verdict, _, _ in gains)} worse;"
        f" {_apart(verdict for _, verdict, _, _ in gains)} {UNCOUNTED}"
        + (f"; the largest gain is {-best[0]:.3f} nats ({best[2]} at {best[3]:.0%})." if best else ".")
    )  # fmt: skip
    return "\n".join([
        "## Equal shares beside greedy and sensitivity-based ones",
        "",
        "The same bytes, shared out over projections (channel methods: greedy within a layer, or by sensitivity over"
        f" all of them) or over layers (neuron methods: by sensitivity).{told}",
        "",
        "| budget | equal shares | perplexity | shares | perplexity | difference (nats) | interval | here |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ])  # fmt: skip


def auto_section(book: Book, budgets: Tables) -> str:
    """auto beside the best measured plan of one method, shares allocated or not, and what it dropped where."""
    lines, picks = [], []
    for target, entries in budgets.items():
        rows = book.rows(entries)
        auto = next((row for row in rows if row.entry.label == "auto"), None)
        others = [row for row in rows if row.entry.label != "auto" and not _ideal(row.entry)]
        if auto is None or not others:
            continue
        found = book.difference(auto.entry, others[0].entry)
        clear = " and clearly better" if found.value < -CHANNEL_NOISE and found.high < 0 else ""
        bar = f"met{clear}" if found.value <= CHANNEL_NOISE else "**missed**"
        apart = found.verdict(CHANNEL_NOISE)
        best, count = others[0], len({row.entry.plan for row in others})
        lines.append(
            f"| {target:.0%} | {auto.ppl:.4g} | {auto.realised:.1%} | {count} | `{best.entry.shown}` {best.ppl:.4g} |"
            f" {best.realised:.1%} | {found.told} | {f'{bar}, at {apart}' if APART in apart else bar} |"
        )
        picks.append((target, book.dropped(auto.entry)))
    if not lines:
        return ""
    return "\n".join([
        "## auto beside the best single method",
        "",
        "Its bar: no worse by more than"
        f" {CHANNEL_NOISE} nats per token than the best plan of one method that was measured at the budget, equal"
        " shares or allocated ones (rulers apart), on text that nothing was fitted on.",
        "",
        "| budget | auto | realised | measured plans | the best of them | realised | difference | interval | bar |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        *_chosen(picks),
    ])  # fmt: skip


def _chosen(picks: Sequence[tuple[float, pl.DataFrame]]) -> list[str]:
    """The share that auto drops of each unit: by budget, and layer by layer at the largest."""
    if not picks:
        return []
    units = [unit.value for unit in Unit if any(unit.value in frame["unit"] for _, frame in picks)]
    lines = [
        "",
        "What it dropped, mean over layers (a projection's input channels; `neuron`: CATS' neurons):",
        "",
        f"| budget | {' | '.join(units)} |",
        "|---" * (1 + len(units)) + "|",
        *(f"| {target:.0%} | {_cells(frame, units, frame['layer'].n_unique())} |" for target, frame in picks),
    ]
    target, frame = picks[-1]
    by_layer = [
        f"| {layer} | {_cells(frame.filter(layer=layer), units, 1)} |" for layer in frame["layer"].unique().sort()
    ]
    head = [f"| layer at {target:.0%} | {' | '.join(units)} |", "|---" * (1 + len(units)) + "|"]
    return [*lines, "", *head, *by_layer]


def _cells(frame: pl.DataFrame, units: Sequence[str], layers: int) -> str:
    sums = {unit: frame.filter(unit=unit)["share"].sum() / layers for unit in units}
    return " | ".join(f"{share:.0%}" if share else "-" for share in sums.values())


def _without_allocation(label: str) -> tuple[str, str]:
    """A label without its allocation, and the allocation."""
    name, _, options = label.partition(":")
    listed = options.split(",")
    kind = next(one.partition("=")[2] for one in listed if one.startswith("allocation="))
    rest = ",".join(one for one in listed if not one.startswith("allocation="))
    return (f"{name}:{rest}" if rest else name), kind


def _ideal(entry: Entry) -> bool:
    """Whether a plan needs what it saves."""
    return all_methods()[parse(entry.plan).method.name].ideal


def _channels(label: str) -> bool:
    return isinstance(parse(f"{label}@0.5").method, ChannelMethod | LaRoSA)


def _noise(label: str) -> float:
    method = parse(f"{label}@0.5").method
    if isinstance(method, ChannelMethod | LaRoSA) or method.name == "auto":
        return CHANNEL_NOISE
    return NEURON_NOISE if method.decides.value == "per token" and not method.control else SEQUENCE_NOISE


def _value(rows: pl.DataFrame, metric: str, where: str = "") -> float:
    found = rows.filter(metric=metric, param=where)["value"]
    return float(found[0]) if len(found) and found[0] is not None else float("nan")
