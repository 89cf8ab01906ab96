"""`run`: profile, threshold, evaluate, report; complete runs are used again."""

from dataclasses import dataclass, replace

from actsparse.errors import DataError
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.plans import check_names
from actsparse.pipelines.profile import profile
from actsparse.pipelines.profiled import too_short
from actsparse.pipelines.progress import Progress, Silent
from actsparse.pipelines.threshold import threshold
from actsparse.specs import EvalSpec, ProfileSpec, RunSpec, ThresholdSpec
from actsparse.store.runs import EvalRun, PlanRun, ProfileRun

CORPUS_BLOCKS = 8


@dataclass(frozen=True)
class Finished:
    """What the three measuring verbs found."""

    profile: ProfileRun
    plan: PlanRun
    evaluation: EvalRun


def measure(spec: RunSpec, progress: Progress | None = None) -> Finished:
    """Profile and fit on the even sequences, evaluate on the odd ones; raises DataError where the text is too short."""
    progress = progress or Silent()
    check_names(spec.plans)
    root = spec.output
    if spec.data.corpus is not None and spec.data.limit is None:
        progress.note(f"taking {CORPUS_BLOCKS} blocks of the corpus for each half; --limit N takes more")
        spec = replace(spec, data=replace(spec.data, limit=CORPUS_BLOCKS))
    fitted_on, judged_on = replace(spec.data, part="even"), replace(spec.data, part="odd")
    progress.note("1/4 profile")
    profiled = profile(
        ProfileSpec(model=spec.model, data=fitted_on, probes=spec.probes, root=root, force=spec.force), progress
    )
    if (short := too_short(profiled)) is not None:
        tokens, block = short
        raise DataError(
            f"the half of the text that is fitted on has {tokens} tokens, too few for one block of {block}",
            f"give more text, at least {2 * block} tokens, or shorter blocks: --block-length {max(8, tokens // 2)}",
        )
    progress.note("2/4 threshold")
    plan = threshold(
        ThresholdSpec(
            run=profiled.path, plan="tda", target_error=spec.target_error, device=spec.model.device,
            offline=spec.model.offline, root=root, force=spec.force,
        ),
        progress,
    )  # fmt: skip
    progress.note("3/4 evaluate")
    evaluated = evaluate(
        EvalSpec(
            model=spec.model,
            data=judged_on,
            plans=(str(plan.path), *spec.plans),
            timing_pairs=spec.timing_pairs,
            root=root,
            force=spec.force,
        ),
        progress,
    )
    return Finished(profiled, plan, evaluated)
