"""S1: every method at equal bytes. Shares of neurons and of channels are not comparable; weight bytes not read are."""

from dataclasses import replace

from actsparse.core.bootstrap import Interval
from actsparse.errors import PlanError
from actsparse.methods.registry import all_methods
from actsparse.methods.short import DENSE, parse
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, shown
from actsparse.pipelines.studies.scores import Scored, difference, perplexity, unread_mean
from actsparse.results import ClaimVerdict, PanelKind

S1 = Experiment("frontier", "S1", "Training-free methods at equal model bytes", "methods.md, S1; our definition",
                "At equal bytes the methods that read the input of every projection lose least")  # fmt: skip
TARGETS = (0.25, 0.4, 0.5, 0.65)
LARGEST = 0.95
STEPS, CLOSE, DIGITS = 4, 2e-3, 4
OFF = 0.01
"""A method that misses a budget by more than this share of the bytes on the scored text is named."""
BYTES = "share of the model's bytes not read (realised)"
LEFT_OUT = ("random", "channels-random", "dejavu", "moefication")
"""Floors, and methods that are trained; methods over heads (`heads-*`) cannot reach these bytes either."""
AUTO = "auto"
CHANNELS = ("teal", "wina", "rsparse", "larosa", "channels-static")
STATIC = "static:stat=griffin"


def frontier(bench: Bench) -> Outcome:
    """Perplexity of every method at 25, 40, 50 and 65 % of the model's bytes not read, where that can be reached."""
    targets = TARGETS[:2] if bench.quick else TARGETS
    out = Outcome(S1, bench.quick, settings={"blocks": str(bench.count)})
    out.panel("ppl", "Perplexity at equal bytes", PanelKind.LINE, BYTES, "perplexity",
              log_y=True, reference=perplexity(bench.score(DENSE)).value)  # fmt: skip
    out.panel("share", "Share of its own units that a method drops for it", PanelKind.LINE, BYTES, "share dropped")
    found: dict[float, dict[str, Scored]] = {target: {} for target in targets}
    missed: dict[str, list[str]] = {}
    for name in _methods(bench):
        for target in targets:
            amount = amount_for(bench, name, target)
            if amount is None:
                missed.setdefault(name, []).append(f"{target:.0%}")
                continue
            scored = bench.score(f"{name}@{amount:.{DIGITS}f}")
            found[target][name] = scored
            unread = unread_mean(scored)
            out.add("ppl", name, perplexity(scored, bench.seed), "1", x=unread, n=scored.tokens)
            out.add("share", name, amount, "share", x=unread)
            if abs(unread - target) > OFF:
                out.notes.append(f"{name} was fitted to {target:.0%} of the bytes and leaves {unread:.1%} unread here")
    if bench.quick:
        out.notes.append("auto is left out of the quick form: it measures every other rule first")
    out.notes += [f"{name} cannot reach {', '.join(shares)} of the bytes" for name, shares in missed.items()]
    _conclude(out, bench, found)
    return out


def _conclude(out: Outcome, bench: Bench, found: dict[float, dict[str, Scored]]) -> None:
    rulers = {name for name, cls in all_methods().items() if cls.ideal}
    told, verdict, gap = [], ClaimVerdict.UNDECIDED, None
    for target, scored in found.items():
        real = {name: one for name, one in scored.items() if name not in rulers}
        if not real:
            told.append(f"at {target:.0%} no method that could run is reachable")
            continue
        ranked = sorted(real, key=lambda name: float(real[name].nll.mean()))
        shown_best = ", ".join(f"{name} {perplexity(real[name]).value or 0.0:.1f}" for name in ranked[:3])
        told.append(f"at {target:.0%} of the bytes the best are {shown_best}")
        if gap is None:
            gap, verdict = channel_gap(real, bench.seed)
    number = f"; best neuron method less best channel method {shown(gap)} nats" if gap else ""
    out.conclude("; ".join(told) + number + ".", verdict, gap, "nats")


def channel_gap(real: dict[str, Scored], seed: int) -> tuple[Interval | None, ClaimVerdict]:
    """The best neuron method's NLL less the best channel method's; `auto`, which mixes both, is neither."""
    channels = [name for name in real if name in CHANNELS]
    neurons = [name for name in real if name not in (*CHANNELS, AUTO)]
    if not channels or not neurons:
        return None, ClaimVerdict.UNDECIDED
    neuron, channel = (min(names, key=lambda name: float(real[name].nll.mean())) for names in (neurons, channels))
    gap = difference(real[neuron], real[channel], seed)
    return gap, above(gap, 0.0)


def amount_for(bench: Bench, name: str, target: float) -> float | None:
    """The share of its own units that a method must drop, so that it predicts not to read `target` of the bytes; None
    where even its largest share is too little."""
    if name == AUTO:
        return target
    low, high = 0.0, LARGEST
    if _bytes(bench, name, high) < target:
        return None
    best = high
    for _ in range(STEPS):
        middle = _secant(bench, name, target, low, high)
        found = _bytes(bench, name, middle)
        best = min(best, middle, key=lambda share: abs(_bytes(bench, name, share) - target))
        if abs(found - target) < CLOSE or middle in (low, high):
            break
        low, high = (middle, high) if found < target else (low, middle)
    return best


def _secant(bench: Bench, name: str, target: float, low: float, high: float) -> float:
    """Where the bytes would reach the target if they were linear in the share, which they nearly are."""
    below, over = _bytes(bench, name, low), _bytes(bench, name, high)
    return round(low + (high - low) * (target - below) / max(1e-9, over - below), DIGITS)


def _bytes(bench: Bench, name: str, share: float) -> float:
    return bench.plan(f"{name}@{share:.{DIGITS}f}").predicted.model_bytes_frac if share > 0 else 0.0


def _methods(bench: Bench) -> list[str]:
    """The methods that take a share, serve this model, and need no training."""
    names = []
    for name, cls in all_methods().items():
        if name in LEFT_OUT or name.startswith("heads-"):
            continue
        short = STATIC if name == "static" else name
        try:
            parsed = parse(f"{short}@0.5")
            replace(parsed).method.check(bench.loaded.record.gated)
        except PlanError:
            continue
        if bench.quick and (cls.ideal or name == AUTO):
            continue
        names.append(short)
    return names
