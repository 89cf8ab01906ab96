"""One sentence a plan that a colleague can repeat, and the sentence that says what to use."""

import math
from dataclasses import dataclass
from enum import StrEnum

from actsparse.report.outcomes import Outcome
from actsparse.report.plans import PROMPT_METHODS, Role
from actsparse.report.wording import between, change, number, one_line, percent, span, times
from actsparse.results import Verdict

NEUTRAL, USABLE, COSTLY = 0.01, 0.05, 0.20
SAME_SIZE, FEW = 0.08, 6


class Grade(StrEnum):
    """What a rise in perplexity means here; the limits are 1, 5 and 20 %."""

    NEUTRAL = "no loss that matters"
    USABLE = "usable"
    COSTLY = "a clear loss"
    UNUSABLE = "not usable here"
    UNKNOWN = "quality not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A verdict: the plan it is about (empty: all), its text (which starts with the title), and the grade.

    `alternative` ends the text of a plan that is not to be used: what to use instead.
    """

    plan: str
    title: str
    text: str
    grade: str
    role: str
    alternative: str = ""


def grade(outcome: Outcome) -> Grade:
    """The grade of an outcome's quality by its perplexity beside the dense one."""
    increase = outcome.increase
    if increase is None or math.isnan(increase):
        return Grade.UNKNOWN
    if increase <= NEUTRAL:
        return Grade.NEUTRAL
    if increase <= USABLE:
        return Grade.USABLE
    return Grade.COSTLY if increase <= COSTLY else Grade.UNUSABLE


def verdicts(outcomes: tuple[Outcome, ...]) -> tuple[Sentence, ...]:
    """A sentence for each compared plan, methods before baselines, and one that says what to use.

    The plan to use comes first, the others as they were run, or where they are many by grade and what they can gain.
    """
    compared = [outcome for outcome in outcomes if outcome.name.role is not Role.DENSE]
    best = best_usable(compared)
    methods = [outcome for outcome in compared if outcome.name.role is Role.METHOD]
    ranked = (
        {id(one): place for place, one in enumerate(sorted(methods, key=_usefulness))} if len(methods) > FEW else {}
    )
    ordered = sorted(
        compared,
        key=lambda outcome: (outcome is not best, outcome.name.role is not Role.METHOD, ranked.get(id(outcome), 0)),
    )
    sentences = [_verdict(outcome, compared) for outcome in ordered]
    if any(outcome.name.role is Role.METHOD for outcome in compared):
        sentences.append(Sentence(plan="", title="", text=recommendation(compared), grade="", role="advice"))
    return tuple(sentences)


def _usefulness(outcome: Outcome) -> tuple[int, float]:
    """Less loss first, then more speed: measured, else what the unread bytes allow."""
    return list(Grade).index(grade(outcome)), -(outcome.speedup.value or outcome.reach or 0.0)


def _verdict(outcome: Outcome, compared: list[Outcome]) -> Sentence:
    parts = [speed_phrase(outcome), quality_phrase(outcome)]
    title = title_of(outcome)
    judged = grade(outcome)
    said = f"{title}: {', '.join(part for part in parts if part)}"
    text = f"{said}." if outcome.name.role is Role.ORACLE else f"{said}; {judged}."
    instead = _alternative(outcome, compared)
    text = f"{text[:-1]}; {instead}." if instead else text
    text += _against_static(outcome, compared)
    return Sentence(
        plan=outcome.label,
        title=title,
        text=text,
        grade=judged.name.lower(),
        role=outcome.name.role.value,
        alternative=instead,
    )


def title_of(outcome: Outcome) -> str:
    """The plan in words, with what it was counted to drop where its name does not say it."""
    again = one_line(outcome.label.removeprefix(outcome.name.short))
    title = f"{one_line(outcome.name.title)} {again}".strip()
    if outcome.name.amount is None and (share := outcome.realised.get("neuron_frac")) is not None:
        title += f" ({percent(share, 0)} of neurons)"
    return title


def _alternative(outcome: Outcome, compared: list[Outcome]) -> str:
    """What to use instead of a method that loses too much or is not faster; empty where nothing is better."""
    if outcome.name.role is not Role.METHOD or outcome.increase is None:
        return ""
    best = best_usable(compared)
    if best is None or best is outcome or (_within(outcome, USABLE) and outcome.verdict is Verdict.FASTER):
        return ""
    return f"the fastest plan within {percent(USABLE, 0, signed=True)} is {title_of(best)}, {times(best.speedup.value)}"


def speed_phrase(outcome: Outcome) -> str:
    """What is known of the speed, with its interval and ceiling."""
    ceiling = f"ceiling {times(outcome.reach)}" if outcome.reach is not None else ""
    if outcome.verdict is None:
        return _untimed(outcome)
    inside = "; ".join(part for part in (between(outcome.speedup.low, outcome.speedup.high), ceiling) if part)
    inside = f" ({inside.replace('; ', ', ')})" if inside else ""
    value = times(outcome.speedup.value)
    match outcome.verdict:
        case Verdict.FASTER:
            return f"{value} faster decode{inside}"
        case Verdict.SLOWER:
            return f"slower decode, {value}{inside}"
        case _:
            return f"no significant change in decode speed, {value}{inside}"


def _untimed(outcome: Outcome) -> str:
    """Why there is no speed; of a baseline nothing, it stands there for its quality."""
    if outcome.name.role is not Role.METHOD:
        return "a ruler without speed" if outcome.name.role is Role.ORACLE else ""
    reason = one_line(outcome.speed_reason or "").rstrip(".")
    return f"speed not measured ({reason})" if reason else "speed not measured"


def quality_phrase(outcome: Outcome) -> str:
    """Perplexity dense and sparse with the change."""
    if outcome.ppl.value is None:
        return ""
    if outcome.dense_ppl.value is None:
        return f"perplexity {number(outcome.ppl.value)}"
    risen = f" ({change(outcome.increase)})"
    return f"perplexity {number(outcome.dense_ppl.value)} → {number(outcome.ppl.value)}{risen}"


def _against_static(outcome: Outcome, compared: list[Outcome]) -> str:
    """Whether a static mask of the same size does as well as a mask chosen from the prompt."""
    if outcome.name.method not in PROMPT_METHODS or outcome.ppl.value is None:
        return ""
    rivals = [rival for rival in compared if _is_rival(rival, outcome)]
    if not rivals:
        return ""
    rival = min(rivals, key=lambda other: other.ppl.value or math.inf)
    name = f"{one_line(rival.label)} ({number(rival.ppl.value)}{_bracket(rival.ppl.low, rival.ppl.high)})"
    match _beaten(outcome, rival):
        case True:
            return f" The static mask {name} does better: choosing by prompt buys nothing here."
        case False:
            return f" It beats the static mask {name}."
        case _ if outcome.ppl.low is None or rival.ppl.low is None:
            return f" Without an interval nothing tells it apart from the static mask {name}."
        case _:
            return f" Its interval does not tell it apart from the static mask {name}."


def _beaten(outcome: Outcome, rival: Outcome) -> bool | None:
    """Whether the rival is better for sure (by the paired difference where there is one); None where nobody knows."""
    paired = outcome.paired.get(rival.name.plan)
    if paired is not None and paired.low is not None and paired.high is not None:
        return None if paired.low <= 0 <= paired.high else paired.low > 0
    ours, theirs = outcome.ppl, rival.ppl
    if ours.low is not None and ours.high is not None and theirs.low is not None and theirs.high is not None:
        return None if ours.low <= theirs.high and theirs.low <= ours.high else theirs.high < ours.low
    return None


def _is_rival(rival: Outcome, outcome: Outcome) -> bool:
    theirs, ours = rival.realised.get("model_bytes_frac"), outcome.realised.get("model_bytes_frac")
    same = theirs is not None and ours is not None and abs(theirs - ours) <= SAME_SIZE * ours
    return rival.name.role is Role.STATIC and rival.letter == outcome.letter and rival.ppl.value is not None and same


def _bracket(low: float | None, high: float | None) -> str:
    text = span(low, high)
    return f", {text}" if text else ""


def best_usable(compared: list[Outcome]) -> Outcome | None:
    """The fastest plan whose speed-up is sure and whose perplexity stays within 5 %."""
    fit = [outcome for outcome in compared if outcome.verdict is Verdict.FASTER and _within(outcome, USABLE)]
    return max(fit, key=lambda outcome: outcome.speedup.value or 0.0, default=None)


def headline(compared: list[Outcome]) -> Outcome | None:
    """The plan that the cards show: the fastest usable one, else the timed method that loses least, else any method."""
    methods = [outcome for outcome in compared if outcome.name.role is Role.METHOD]
    timed = [outcome for outcome in methods if outcome.verdict is not None]
    return best_usable(compared) or min(timed or methods or compared, key=_loss, default=None)


def recommendation(compared: list[Outcome]) -> str:
    """What to use: the fastest plan within 5 %, or the one that comes nearest."""
    best = best_usable(compared)
    if best is not None:
        return (
            f"The fastest plan within {percent(USABLE, 0, signed=True)} perplexity is {title_of(best)}: "
            f"{speed_phrase(best)}, {quality_phrase(best)}."
        )
    text = f"No plan here is both faster for sure and within {percent(USABLE, 0, signed=True)} perplexity."
    methods = [outcome for outcome in compared if outcome.name.role is Role.METHOD and _loss(outcome) < math.inf]
    nearest = min(methods, key=_loss, default=None)
    if nearest is None:
        return text
    speed = "not timed" if nearest.verdict is None else speed_phrase(nearest)
    return f"{text} The method that loses least is {title_of(nearest)}: {change(nearest.increase)}, {speed}."


def _within(outcome: Outcome, limit: float) -> bool:
    return outcome.increase is not None and outcome.increase <= limit and outcome.name.role is not Role.ORACLE


def _loss(outcome: Outcome) -> float:
    return math.inf if outcome.increase is None or math.isnan(outcome.increase) else outcome.increase
