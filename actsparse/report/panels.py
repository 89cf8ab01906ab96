"""Runs gathered into what can be drawn in one frame: a profile each, evaluations that are comparable together."""

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import polars as pl

from actsparse.report.outcomes import Outcome, outcomes_of
from actsparse.report.plans import Role
from actsparse.report.sources import Source
from actsparse.report.wording import one_line
from actsparse.results import Generation, ModelRecord, RunKind, TextRecord, ThresholdPlan
from actsparse.store.runs import PlanRun

SAME_DENSE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ProfilePanel:
    """One profile: its tables (`measures` of prefill, `decode` of the model's own tokens),
    and the plans of the report that were fitted to the same model."""

    label: str
    source: Source
    measures: pl.DataFrame
    decode: pl.DataFrame
    neurons: pl.DataFrame
    heads: pl.DataFrame
    histograms: dict[str, Any]
    probes: dict[str, Any]
    coactivation: dict[str, Any]
    plans: tuple[ThresholdPlan, ...]


@dataclass(frozen=True, kw_only=True)
class EvalPanel:
    """Evaluations of one model on one text, drawn together; `plan` in the tables is the label of an outcome."""

    label: str
    sources: tuple[Source, ...]
    outcomes: tuple[Outcome, ...]
    results: pl.DataFrame
    tokens: pl.DataFrame
    timing: pl.DataFrame
    throughput: pl.DataFrame
    generations: tuple[Generation, ...]
    vocabulary: dict[int, str]

    @property
    def dense(self) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.name.role is Role.DENSE), None)

    @property
    def compared(self) -> tuple[Outcome, ...]:
        """Every outcome but dense."""
        return tuple(outcome for outcome in self.outcomes if outcome.name.role is not Role.DENSE)


Panel = ProfilePanel | EvalPanel


def profile_panels(sources: tuple[Source, ...]) -> tuple[ProfilePanel, ...]:
    """One panel a profile run, in order."""
    profiles = [source for source in sources if source.kind is RunKind.PROFILE]
    fitted = [plan for source in sources if (plan := plan_of(source)) is not None]
    labels = _labels(profiles)
    return tuple(
        ProfilePanel(
            label=label,
            source=source,
            measures=source.table("measures"),
            decode=source.decode_measures(),
            neurons=source.table("neurons"),
            heads=source.table("heads"),
            histograms=source.arrays("histograms"),
            probes=source.arrays("probes"),
            coactivation=source.arrays("coactivation"),
            plans=tuple(plan for plan in fitted if same_model(plan.model, source.manifest.model)),
        )
        for source, label in zip(profiles, labels, strict=True)
    )


def eval_panels(sources: tuple[Source, ...]) -> tuple[EvalPanel, ...]:
    """Evaluations grouped by model and scored text, in order of first appearance."""
    groups: dict[tuple[object, ...], list[Source]] = {}
    for source in sources:
        if source.kind is RunKind.EVAL:
            groups.setdefault(_comparable(source), []).append(source)
    labels = _labels([group[0] for group in groups.values()])
    fitted = short_forms(sources)
    return tuple(_eval_panel(label, tuple(group), fitted) for label, group in zip(labels, groups.values(), strict=True))


def short_forms(sources: tuple[Source, ...]) -> dict[str, str]:
    """Short forms of the plan runs of the report, by the paths that an evaluation may name them by."""
    found = {}
    for source in sources:
        if (plan := plan_of(source)) is not None:
            found |= dict.fromkeys((str(source.run.path), str(source.run.path.resolve())), plan.short)
    return found


def _eval_panel(label: str, sources: tuple[Source, ...], fitted: dict[str, str]) -> EvalPanel:
    outcomes: list[Outcome] = []
    parts: dict[str, list[pl.DataFrame]] = {"results": [], "tokens": [], "timing": [], "throughput": []}
    generations: list[Generation] = []
    vocabulary: dict[int, str] = {}
    for source in sources:
        taken = {outcome.label for outcome in outcomes}
        renamed: dict[str, str] = {}
        timing = source.table("timing")
        found = outcomes_of(source, fitted)
        again = {outcome.name.plan for outcome in found if _same_dense(outcome, outcomes)}
        for outcome in found:
            name = outcome.name
            if name.plan in again:
                continue
            shown = f"{name.short} ({source.letter})" if name.short in taken else name.short
            if shown in renamed.values():
                shown = f"{name.short} ({PurePath(name.plan).name})"
            renamed[name.plan] = shown
            outcomes.append(replace(beside_its_own_dense(outcome, timing), label=shown))
        for table, frames in parts.items():
            rows = source.table(table).filter(~pl.col("plan").is_in(list(again)))
            frames.append(rows.with_columns(pl.col("plan").replace(renamed)))
        generations += [_relabel(one, renamed) for one in source.generations() if one.plan not in again]
        vocabulary |= source.vocabulary()
    return EvalPanel(
        label=label,
        sources=sources,
        outcomes=tuple(outcomes),
        results=pl.concat(parts["results"]),
        tokens=pl.concat(parts["tokens"]),
        timing=pl.concat(parts["timing"]),
        throughput=pl.concat(parts["throughput"]),
        generations=tuple(generations),
        vocabulary=vocabulary,
    )


def _same_dense(outcome: Outcome, before: list[Outcome]) -> bool:
    """Whether this is the dense model that an earlier run scored too, to rounding: it stands there once."""
    known = next((one for one in before if one.name.role is Role.DENSE), None)
    if known is None or outcome.name.role is not Role.DENSE:
        return False
    one, other = known.ppl.value, outcome.ppl.value
    return one is not None and other is not None and abs(other - one) <= SAME_DENSE * one


def beside_its_own_dense(outcome: Outcome, timing: pl.DataFrame) -> Outcome:
    """The outcome with dense times from the very laps that it was paired with.

    The dense row of the results pools the laps of all plans; on a machine whose speed drifts that is another number
    than the one which the speed-up was measured against.
    """
    laps = timing.filter((pl.col("plan") == outcome.name.plan) & (pl.col("arm") == "dense"))
    decode = laps.filter((pl.col("phase") == "decode") & (pl.col("tokens") > 0))
    prefill = laps.filter(pl.col("phase") == "prefill")["seconds"].median()
    step = (decode["seconds"] / decode["tokens"]).median()
    if isinstance(step, float) and outcome.speedup.value is not None:
        outcome = replace(outcome, dense_ms=replace(outcome.dense_ms, value=1e3 * step, n=decode.height))
    if isinstance(prefill, float) and outcome.ttft_ms is not None:
        outcome = replace(outcome, dense_ttft_ms=1e3 * prefill)
    return outcome


def _relabel(generation: Generation, renamed: dict[str, str]) -> Generation:
    return replace(generation, plan=renamed.get(generation.plan, generation.plan))


def same_model(one: ModelRecord | None, other: ModelRecord | None) -> bool:
    """Whether two records describe the same weights under the same dtype."""
    return (
        one is not None and other is not None and (one.weights_sha256, one.dtype) == (other.weights_sha256, other.dtype)
    )


def scored_text(source: Source) -> TextRecord | None:
    """The text whose tokens an evaluation scored."""
    return next((text for text in source.manifest.texts if text.role == "quality"), None)


def plan_of(source: Source) -> ThresholdPlan | None:
    """The plan of a plan run that was written to its end."""
    if isinstance(source.run, PlanRun) and (source.run.path / "plan.json").exists():
        return source.run.plan
    return None


def calibration_of(source: Source) -> TextRecord | None:
    """The text that a plan run was fitted on."""
    plan = plan_of(source)
    return plan.calibration if plan else None


def _comparable(source: Source) -> tuple[object, ...]:
    model, text = source.manifest.model, scored_text(source)
    if model is None or text is None:
        return (source.letter,)
    cut = (text.sha256, text.blocks, text.block_length, text.prompt_length, text.tokens, text.window_hashes)
    return (model.weights_sha256, model.dtype, *cut)


def _labels(sources: list[Source]) -> list[str]:
    """What tells the panels apart: nothing for one, the models, or the runs' letters where a model comes twice."""
    if len(sources) < 2:
        return [""] * len(sources)
    names = [source.model_name for source in sources]
    return [
        name if names.count(name) == 1 else f"{source.letter}: {name}, {one_line(source.run.path.name)}"
        for source, name in zip(sources, names, strict=True)
    ]
