"""Which experiments each study runs, in order."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from actsparse.errors import PlanError
from actsparse.pipelines.studies import (
    donors,
    frontier,
    heads,
    mechanisms,
    pitfalls,
    routers,
    sensitivity,
    speed,
    tda,
    union,
    window,
)
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome


@dataclass(frozen=True)
class Runner:
    """An experiment and the function that runs it; `timed` where what it finds depends on the machine."""

    of: Experiment
    run: Callable[[Bench], Outcome]
    timed: bool = False


STUDIES: dict[str, tuple[Runner, ...]] = {
    "pitfalls": (
        Runner(pitfalls.P1, pitfalls.cett_sparsity),
        Runner(heads.P2, heads.head_sparsity),
        Runner(heads.P3, heads.kv_policies),
        Runner(routers.P4, routers.router_inputs),
        Runner(pitfalls.P5, pitfalls.quality_by_sparsity),
    ),
    "moyu": (
        Runner(speed.M1, speed.trinity, timed=True),
        Runner(mechanisms.M2, mechanisms.root_cause),
        Runner(mechanisms.M3, mechanisms.history_uncertainty),
        Runner(mechanisms.M4, mechanisms.inertia_without_meaning),
        Runner(donors.M5, donors.donor_swap),
        Runner(routers.HU3, routers.domain_gap),
    ),
    "tda": (
        Runner(tda.T1, tda.compare),
        Runner(speed.T2, speed.latency, timed=True),
        Runner(tda.T3, tda.threshold_or_count),
        Runner(tda.T4, tda.first_tokens),
        Runner(tda.T5, tda.staleness),
        Runner(tda.T6, tda.other_lengths),
    ),
    "frontier": (Runner(frontier.S1, frontier.frontier), Runner(sensitivity.S2, sensitivity.one_layer)),
    "window": (Runner(window.S6, window.window_sensitivity),),
    "union": (Runner(union.S4, union.batch_unions),),
}


def runners(study: str, only: tuple[str, ...] = ()) -> tuple[Runner, ...]:
    """The experiments of a study, or those that `only` names; raises PlanError with the nearest names otherwise."""
    if study not in STUDIES:
        near = get_close_matches(study, STUDIES, n=1)
        hint = (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(STUDIES)}"
        raise PlanError(f"there is no study '{study}'", hint)
    known = {runner.of.name: runner for runner in STUDIES[study]}
    for name in only:
        if name not in known:
            raise PlanError(f"the study {study} has no experiment '{name}'", f"it has {', '.join(known)}")
    return tuple(known[name] for name in known if not only or name in only)
