"""The banner: what the reader must know before the numbers, from the runs and from comparing them."""

import re
from dataclasses import dataclass

from actsparse.report.outcomes import Outcome
from actsparse.report.panels import EvalPanel, calibration_of, scored_text, short_forms
from actsparse.report.sources import Source
from actsparse.report.wording import clean, listed, one_line, percent, times
from actsparse.results import RunKind, TextRecord, path_tolerance
from actsparse.store.provenance import again

_PLACE = re.compile(r"(?P<plan>[^\s{}]+) at batch (?P<batch>\d+), prompt (?P<prompt>\d+): (?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A warning and the letter of the run it comes from (empty: from comparing runs)."""

    letter: str
    text: str


def notices(sources: tuple[Source, ...], evals: tuple[EvalPanel, ...]) -> tuple[Notice, ...]:
    """Incomplete runs first, then overlap, the runs' own warnings, and what may not be compared; each once."""
    found = [
        *_incomplete(sources),
        *_overlaps(sources),
        *_own(sources),
        *_path_checks(evals),
        *_beyond_ceiling(evals),
        *_comparisons(sources, evals),
    ]
    return tuple(dict.fromkeys(_merged(found)))


def _merged(found: list[Notice]) -> list[Notice]:
    """The notices with those that say the same of several batch sizes and prompt lengths as one, where the first is."""
    places: dict[Notice, tuple[list[str], list[str]]] = {}
    for notice in found:
        if match := _PLACE.match(notice.text):
            alike = Notice(letter=notice.letter, text=f"{match['plan']} at {{}}: {match['rest']}")
            batches, prompts = places.setdefault(alike, ([], []))
            batches.append(match["batch"])
            prompts.append(match["prompt"])
        else:
            places.setdefault(notice, ([], []))
    merged = []
    for notice, (batches, prompts) in places.items():
        if not batches:
            merged.append(notice)
            continue
        where = f"batch {listed(list(dict.fromkeys(batches)))}, prompt {listed(list(dict.fromkeys(prompts)))}"
        merged.append(Notice(letter=notice.letter, text=notice.text.replace("{}", where, 1)))
    return merged


def _incomplete(sources: tuple[Source, ...]) -> list[Notice]:
    found = []
    for source in sources:
        if not source.complete:
            command = one_line(again(source.manifest.provenance.command))
            text = f"This run is incomplete: what it has written so far is drawn. Resume it with: {command}"
            found.append(Notice(letter=source.letter, text=text))
        found += [Notice(letter=source.letter, text=f"Left out: {one_line(what)}") for what in source.unreadable]
    return found


def _own(sources: tuple[Source, ...]) -> list[Notice]:
    """The runs' own warnings, with plans by their names where they are named by their folders."""
    plans = short_forms(sources)

    def named(text: str) -> str:
        for path in sorted(plans, key=len, reverse=True):
            text = text.replace(path, plans[path])
        return clean(text)

    return [Notice(letter=source.letter, text=named(text)) for source in sources for text in source.manifest.warnings]


def _overlaps(sources: tuple[Source, ...]) -> list[Notice]:
    """Text that a plan was fitted on and that is scored too, where the run itself does not warn of it."""
    found = []
    for source in sources:
        if source.kind is not RunKind.EVAL or (scored := scored_text(source)) is None or _warned(source):
            continue
        fitted = [text for text in source.manifest.texts if text.role == "calibration"]
        fitted += [text for other in sources if (text := calibration_of(other)) is not None]
        share = max((overlap(text, scored) for text in fitted), default=0.0)
        if share > 0:
            text = (
                f"Calibration text overlaps the evaluation text: about {percent(share, 0)} of what was scored in "
                f"{one_line(scored.source)} was also used to fit. Quality looks better than it is."
            )
            found.append(Notice(letter=source.letter, text=text))
    return found


def _warned(source: Source) -> bool:
    said = [text.lower() for text in source.manifest.warnings]
    return any(("overlap" in text and "calib" in text) or "fitted on text that is evaluated" in text for text in said)


def overlap(fitted: TextRecord, scored: TextRecord) -> float:
    """The share of `scored` that `fitted` holds too: by windows of tokens where both were sampled, else by blocks."""
    if fitted.window_hashes and scored.window_hashes:
        return len(set(fitted.window_hashes) & set(scored.window_hashes)) / len(set(scored.window_hashes))
    if fitted.sha256 != scored.sha256 or fitted.block_length != scored.block_length:
        return 0.0
    if fitted.blocks is None or scored.blocks is None:
        return 1.0
    shared = min(fitted.blocks[1], scored.blocks[1]) - max(fitted.blocks[0], scored.blocks[0])
    return max(0, shared) / max(1, scored.blocks[1] - scored.blocks[0])


def _path_checks(evals: tuple[EvalPanel, ...]) -> list[Notice]:
    return [
        Notice(
            letter=outcome.letter,
            text=f"{one_line(outcome.label)}: engine and masked path differ by {outcome.path_check:.2g} nats "
            f"on the checked tokens (tolerance {_tolerance(panel):g}); speed and quality may not be of the same model.",
        )
        for panel in evals
        for outcome in panel.outcomes
        if outcome.path_check is not None
        and outcome.path_check > _tolerance(panel)
        and not _path_warned(panel, outcome)
    ]


def _tolerance(panel: EvalPanel) -> float:
    model = panel.sources[0].manifest.model
    return path_tolerance(model.dtype if model else "")


def _beyond_ceiling(evals: tuple[EvalPanel, ...]) -> list[Notice]:
    """Speed-ups above what the unread bytes allow, by run: those that are sure, and those within their interval."""
    found = []
    for panel in evals:
        above = [one for one in panel.compared if one.speedup.value and one.reach and one.speedup.value > one.reach]
        for letter in dict.fromkeys(outcome.letter for outcome in above):
            mine = [outcome for outcome in above if outcome.letter == letter]
            sure = [one for one in mine if one.speedup.low is not None and one.speedup.low > (one.reach or 0.0)]
            found += _ceiling_notice(
                letter, sure, "above the ceiling for sure: weight bytes are not what bounds decoding here, so "
                "dense has overhead that the sparse step is spared"
            )  # fmt: skip
            unsure = [one for one in mine if one not in sure]
            found += _ceiling_notice(
                letter, unsure, "above the ceiling, which the interval contains: that is noise, measure again on an "
                "idle machine"
            )  # fmt: skip
    return found


def _ceiling_notice(letter: str, outcomes: list[Outcome], what: str) -> list[Notice]:
    named = [f"{one_line(one.label)} ({times(one.speedup.value)} of {times(one.reach)})" for one in outcomes]
    are = "speed-up is" if len(named) == 1 else "speed-ups are"
    return [Notice(letter=letter, text=f"{listed(named)}: the {are} {what}.")] if named else []


def _path_warned(panel: EvalPanel, outcome: Outcome) -> bool:
    said = [text for source in panel.sources for text in source.manifest.warnings if source.letter == outcome.letter]
    return any(text.startswith(f"{outcome.name.plan}: engine and masked path differ") for text in said)


def _comparisons(sources: tuple[Source, ...], evals: tuple[EvalPanel, ...]) -> list[Notice]:
    """What of several runs may not be compared, and why."""
    if len(sources) < 2:
        return []
    reference, others = sources[0], dict[str, list[Source]]()
    first = reference.manifest.model
    for source in sources[1:]:
        model = source.manifest.model
        if first and model and first.weights_sha256 != model.weights_sha256:
            others.setdefault(model.weights_sha256, []).append(source)
    found = []
    for group in others.values():
        letters = listed([source.letter for source in group])
        runs = f"Runs {letters} are" if len(group) > 1 else f"Run {letters} is"
        text = (
            f"{runs} of another model ({group[0].model_name}) than the reference {reference.letter} "
            f"({reference.model_name}): shares and ratios to each model's own dense compare, perplexities and "
            "milliseconds do not."
        )
        found.append(Notice(letter="", text=text))
    return found + _text_and_device(evals)


def _text_and_device(evals: tuple[EvalPanel, ...]) -> list[Notice]:
    found = []
    models = [panel.sources[0].manifest.model for panel in evals]
    hashes = [model.weights_sha256 if model else "" for model in models]
    for place, panel in enumerate(evals):
        if hashes[place] in hashes[:place]:
            letters = listed([source.letter for source in panel.sources])
            found.append(
                Notice(
                    letter="",
                    text=f"Run {letters} scored another text or dtype than the evaluations before it: "
                    "its perplexities stand apart.",
                )
            )
        devices = list(dict.fromkeys(one_line(source.manifest.provenance.device) for source in panel.sources))
        if len(devices) > 1:
            found.append(
                Notice(
                    letter="",
                    text=f"Evaluations ran on different devices ({listed(devices)}): "
                    "compare speed-ups, not milliseconds.",
                )
            )
    return found
