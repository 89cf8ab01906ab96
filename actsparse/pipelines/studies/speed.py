"""T2 and M1: what sparse decode costs and gains in time, beside its ceiling (TDA, arXiv 2408.11393), and the trinity of
quality, speed and applicability (MOYU, arXiv 2406.12569).

Times are medians of ABAB pairs in one process. On a machine with other work they say little; the interval shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actsparse.core.bootstrap import Interval
from actsparse.core.cost import LayerDrops, ceiling, saved
from actsparse.engine import timing
from actsparse.engine.choose import Engines
from actsparse.errors import PlanError
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import Plan, by_unit, drops_of
from actsparse.methods.short import DENSE, parse
from actsparse.methods.trained_method import TrainedMethod
from actsparse.models.families import FAMILIES
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, percent, shown
from actsparse.pipelines.studies.routers import options, routed_layers
from actsparse.pipelines.studies.scores import Scored, drop_mean, perplexity, relative_quality
from actsparse.pipelines.studies.tda import PAPER
from actsparse.pipelines.unread import unread_by_engine
from actsparse.results import ClaimVerdict, PanelKind

SHARE = 0.5
T2 = Experiment("tda", "T2", "Latency: prefill, selection and decode apart", PAPER,
                "Generation is 18 to 25 % faster than dense")  # fmt: skip
M1 = Experiment("moyu", "M1", "The impossible trinity: quality, speed, applicability", "MOYU, arXiv 2406.12569",
                "No kind of dynamic activation has quality, speed and applicability together")  # fmt: skip
PROMISED = 1.18
KEPT, FASTER = 0.95, 1.05
"""Our bars for the trinity with every layer sparse: 95 % of dense quality, 5 % faster."""


@dataclass(frozen=True)
class Timed:
    """The speed of a plan, or why it has none; `not_read` is the share of the model's bytes that the timed laps did not
    read, or that the plan predicts not to, where the engine does not count (`counted`)."""

    speed: timing.Speed | None
    reason: str
    not_read: float
    counted: bool = False

    @property
    def speedup(self) -> Interval:
        """The paired ratio dense / sparse."""
        if self.speed is None:
            return Interval(value=None, low=None, high=None, n=0, stderr=None)
        one = self.speed
        return Interval(value=one.speedup, low=one.low, high=one.high, n=one.pairs, stderr=None)


def time_plan(bench: Bench, engines: Engines, plan: Plan, *, prompt: int, tokens: int) -> Timed:
    """See `time_gates`."""
    return time_gates(bench, engines, plan.gates(), plan.predicted.model_bytes_frac, prompt=prompt, tokens=tokens)


def time_gates(
    bench: Bench, engines: Engines, gates: Sequence[LayerGates], predicted: float, *, prompt: int, tokens: int
) -> Timed:
    """ABAB pairs of dense and sparse decode after the first `prompt` tokens of the first block; `predicted` is the
    share of the model's bytes that the gates are expected not to read."""
    ids = bench.pool[0, :prompt][None].to(bench.loaded.device)
    try:
        with engines.open(gates, sink_tokens=bench.sink_tokens, max_length=prompt + tokens + 2) as run:
            laps = timing.measure(run, bench.loaded.model, ids, pairs=5 if bench.quick else 15, tokens=tokens)
            unread = unread_by_engine(gates, run.kept(), bench.cost)
    except PlanError as error:
        return Timed(None, error.what, predicted)
    not_read = predicted if unread is None else unread.model_bytes_frac
    return Timed(timing.summary({0: laps}), "", not_read, counted=unread is not None)


def latency(bench: Bench) -> Outcome:
    """T2: milliseconds of each phase for TDA, GRIFFIN and static pruning, after short and long prompts."""
    tokens = 16 if bench.quick else 64
    longest = bench.block_length - tokens - 2
    prompts = [k for k in ((64, 256) if bench.quick else (64, 128, 256, 512, 1024)) if k <= longest] or [longest]
    out = Outcome(T2, bench.quick, settings={"share dropped": f"{SHARE:g}", "decoded tokens": str(tokens),
                                             "device": str(bench.loaded.device)})  # fmt: skip
    out.panel("phases", "Time by phase", PanelKind.LINE, "prompt tokens", "milliseconds", log_x=True)
    out.panel("speedup", "Speed-up of decode beside its ceiling", PanelKind.LINE, "prompt tokens", "dense / sparse",
              log_x=True, reference=1.0)  # fmt: skip
    engines, found = Engines(bench.loaded.sites, bench.progress.note), {}
    for name in (f"tda@{SHARE:g}", f"griffin@{SHARE:g}", f"static:stat=griffin@{SHARE:g}"):
        for prompt in prompts:
            timed = time_plan(bench, engines, bench.plan(name), prompt=prompt, tokens=tokens)
            found[name, prompt] = timed
            _add_phases(out, name, prompt, timed)
    tda = found[f"tda@{SHARE:g}", prompts[-1]]
    if tda.speed is None:
        out.conclude(f"TDA was not timed: {tda.reason}.", ClaimVerdict.UNDECIDED)
        return out
    best = ceiling(tda.not_read)
    even = tda.speed.break_even_tokens
    out.conclude(
        f"at {SHARE:.0%} dropped TDA decodes {shown(tda.speedup)} times as fast as dense in the same engine (ceiling"
        f" {best:.2f}; {(tda.speed.speedup - 1) / (best - 1):.0%} of the possible gain), after"
        f" {tda.speed.select_ms:.1f} ms of selection"
        + (f" that {even:.0f} decoded tokens repay." if even is not None else " that is never repaid."),
        above(tda.speedup, PROMISED),
        tda.speedup,
    )
    return out


def _add_phases(out: Outcome, name: str, prompt: int, timed: Timed) -> None:
    speed = timed.speed
    if speed is None:
        out.notes.append(f"{name} was not timed: {timed.reason}")
        return
    phases = {
        "prefill": speed.sparse_prefill_ms,
        "selection": speed.select_ms,
        "decode a token": speed.sparse_ms,
        "dense decode a token": speed.dense_ms,
    }
    for phase, milliseconds in phases.items():
        out.add("phases", f"{name}: {phase}", milliseconds, "ms", x=prompt, n=speed.pairs)
    out.add("speedup", name, timed.speedup, "1", x=prompt)
    out.add("speedup", f"{name}: ceiling", ceiling(timed.not_read), "1", x=prompt)
    if not timed.counted:
        out.notes.append(f"{name} after {prompt} tokens: this engine does not count what it reads, so the ceiling is"
                         " that of the bytes predicted")  # fmt: skip


def kinds(bench: Bench) -> dict[str, str]:
    """MOYU's four kinds of dynamic activation, each by one method behind the same interface."""
    training = options(bench) or "tokens=16384"
    where = f",layers=0-{len(routed_layers(bench)) - 1}" if bench.quick else ""
    return {
        "TDA: threshold": f"tda@{SHARE:g}",
        "RODA: router off the loop": f"dejavu:input=lookahead,{training}@{SHARE:g}",
        "RIDA: router in the loop": f"moefication:router=mlp,{training}@{SHARE:g}",
        "sRIDA: one decision a sequence": f"moefication:routing=sequence{where}@{SHARE:g}",
    }


@dataclass(frozen=True)
class Bars:
    """What a kind must reach: the share of the quality, the speed-up, and the count of families: as many as are dense,
    since studies are defined for dense models. With fewer layers sparse both shares shrink in proportion, so that n
    layers of L ask for an n/L-th of the loss and of the gain."""

    quality: float
    speedup: float
    families: int

    @classmethod
    def of(cls, bench: Bench) -> "Bars":
        """The bars for the layers that are sparse."""
        part = len(routed_layers(bench)) / bench.layers
        return cls(KEPT**part, 1 + (FASTER - 1) * part, sum(family.experts is None for family in FAMILIES.values()))

    def passed(self, quality: Interval, speedup: Interval, families: int) -> bool | None:
        """True where every whole interval passes, False where one is wholly under its bar, None between."""
        pairs = ((quality, self.quality), (speedup, self.speedup))
        if families < self.families or any(one.high is not None and one.high < bar for one, bar in pairs):
            return False
        return True if all(one.low is not None and one.low >= bar for one, bar in pairs) else None


@dataclass(frozen=True)
class Measured:
    """One kind: its quality, speed and families."""

    scored: Scored
    timed: Timed
    families: int


def trinity(bench: Bench) -> Outcome:
    """M1: quality kept, measured speed-up and the families served, for TDA, RODA, RIDA and sRIDA at one share, all in
    the same layers: every one, or in a quick run those few that routers are trained for."""
    bars, layers = Bars.of(bench), routed_layers(bench)
    out = Outcome(M1, bench.quick, settings={
        "share dropped": f"{SHARE:g}", "blocks": str(bench.count), "sparse layers": f"0-{len(layers) - 1}",
        "training": options(bench) or "full", "bars": f"quality {bars.quality:.4g}, speed-up {bars.speedup:.4g}",
    })  # fmt: skip
    out.panel("trinity", "Quality kept, speed measured, families served", PanelKind.TABLE, "kind", "value")
    engines, dense = Engines(bench.loaded.sites, bench.progress.note), bench.score(DENSE)
    passed, told, qualities = [], [], []
    for kind, short in kinds(bench).items():
        found = _measure_kind(bench, engines, short)
        quality, speedup = relative_quality(found.scored, dense, bench.seed), found.timed.speedup
        _add_kind(out, bench, kind, quality, found)
        qualities.append(quality)
        passed.append(bars.passed(quality, speedup, found.families))
        told.append(f"{kind.partition(':')[0]} {percent(quality)} and {shown(speedup, ' x', 2)}")
    out.conclude(
        f"at {SHARE:.0%} dropped in {len(layers)} of {bench.layers} layers, quality kept and speed-up are:"
        f" {'; '.join(told)}; {passed.count(True)} of {len(passed)} kinds pass our bars ({bars.quality:.1%} of the"
        f" quality, {bars.speedup:.3g} times as fast, as many families as are dense: {bars.families} of"
        f" {len(FAMILIES)}), {passed.count(False)} miss one of them.",
        _trinity_verdict(passed),
        max(qualities, key=lambda one: one.value or 0.0),
        "share",
    )
    return out


def _trinity_verdict(passed: list[bool | None]) -> ClaimVerdict:
    if any(passed):
        return ClaimVerdict.FAILS
    return ClaimVerdict.UNDECIDED if None in passed else ClaimVerdict.HOLDS


def _measure_kind(bench: Bench, engines: Engines, short: str) -> Measured:
    """A kind in the layers under study, the others dense."""
    fitted, sparse = bench.trained if isinstance(parse(short).method, TrainedMethod) else bench, routed_layers(bench)
    plan, record = fitted.plan(short), bench.loaded.record
    gates = [gate if layer in sparse else bench.whole for layer, gate in enumerate(plan.gates())]
    drops = drops_of(plan.gates(), by_unit(plan.fit, plan.fit.predicted_drop), gated=record.gated)
    drops = [one if layer in sparse else LayerDrops() for layer, one in enumerate(drops)]
    return Measured(
        bench.score_gates(f"{short} in {len(sparse)} layers", lambda _block: gates),
        time_gates(
            bench, engines, gates, saved(bench.cost, drops).model_bytes_frac, prompt=bench.prompt_length,
            tokens=12 if bench.quick else 48,
        ),
        families_of(short),
    )  # fmt: skip


def _add_kind(out: Outcome, bench: Bench, kind: str, quality: Interval, found: Measured) -> None:
    timed = found.timed
    columns = {
        "quality kept": (quality, "share"),
        "perplexity": (perplexity(found.scored, bench.seed), "1"),
        "dropped": (drop_mean(found.scored, bench.seed), "share"),
        "bytes not read": (timed.not_read, "share"),
        "speed-up": (timed.speedup, "1"),
        "ceiling": (ceiling(timed.not_read), "1"),
        "families": (float(found.families), "count"),
        "families in all": (float(len(FAMILIES)), "count"),
    }
    for label, (value, unit) in columns.items():
        out.add("trinity", kind, value, unit, label=label)
    if timed.speed is None:
        out.notes.append(f"{kind} was not timed: {timed.reason}")


def families_of(short: str) -> int:
    """How many families of the table a method serves: with or without a gate, and mixtures of experts, where it can."""
    method = parse(short).method
    return sum(
        (family.gate is not None or not method.gated_only) and (family.experts is None or method.serves_experts)
        for family in FAMILIES.values()
    )
