"""Continuations side by side with the place where each leaves the dense one, and the tokens that suffer most."""

from dataclasses import dataclass
from itertools import takewhile

import polars as pl

from actsparse.report.panels import EvalPanel
from actsparse.report.plans import Role
from actsparse.report.wording import clean

WORST, CONTEXT, PLANS = 4, 8, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A continuation in two parts: as dense wrote it, and from the first difference on."""

    plan: str
    same: str
    different: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and its continuations, dense first."""

    prompt: str
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A scored token under a plan: where it stands, what came before it, and how much worse it became."""

    plan: str
    block: int
    position: int
    before: str
    token: str
    delta_nll: float
    kl: float


def samples(panel: EvalPanel) -> tuple[Sample, ...]:
    """The continuations of each prompt."""
    found = []
    for prompt in dict.fromkeys(generation.prompt for generation in panel.generations):
        rows = [generation for generation in panel.generations if generation.prompt == prompt]
        rows.sort(key=lambda generation: generation.plan != Role.DENSE)
        dense = rows[0].text if rows[0].plan == Role.DENSE else None
        continuations = []
        for row in rows:
            same, different = split_at_difference(dense, row.text) if dense is not None else (row.text, "")
            where = row.first_divergence
            repeats = f"; {100 * row.repetition:.0f} % repeated" if row.repetition >= 0.2 else ""
            note = f"{row.tokens} tokens{repeats}"
            if row.plan != Role.DENSE:
                note = (
                    f"as dense for all {row.tokens} tokens" if where is None else f"leaves dense at token {where}"
                ) + repeats
            continuations.append(
                Continuation(
                    plan=row.plan,
                    same=clean(same).lstrip(),
                    different=clean(different) if same else clean(different).lstrip(),
                    note=note,
                )
            )
        found.append(Sample(prompt=clean(rows[0].prompt_text), continuations=tuple(continuations)))
    return tuple(found)


def split_at_difference(dense: str, text: str) -> tuple[str, str]:
    """The text cut where it first differs from dense, at the start of the word."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(dense, text, strict=False)))
    if same == len(text):
        return text, ""
    while same and not text[same - 1].isspace():
        same -= 1
    return text[:same], text[same:]


def worst_tokens(panel: EvalPanel) -> tuple[WorstToken, ...]:
    """The tokens whose negative log-likelihood rises most over dense, at most four a plan."""
    keys = ["block", "position"]
    dense = panel.tokens.filter(pl.col("plan") == Role.DENSE).unique(keys, keep="first", maintain_order=True)
    if dense.is_empty():
        return ()
    ids = {(block, position): token for block, position, token in dense.select(*keys, "token").iter_rows()}
    methods = [outcome.label for outcome in panel.compared if outcome.name.role is Role.METHOD][:PLANS]
    found = []
    for plan in methods:
        sparse = panel.tokens.filter((pl.col("plan") == plan) & pl.col("nll").is_finite())
        joined = sparse.join(dense.select(*keys, dense_nll="nll"), on=keys, maintain_order="left").with_columns(
            delta=pl.col("nll") - pl.col("dense_nll")
        )
        for row in joined.sort("delta", descending=True).head(WORST).iter_rows(named=True):
            block, position = row["block"], row["position"]
            before = [ids[block, place] for place in range(position - CONTEXT, position) if (block, place) in ids]
            token = WorstToken(
                plan=plan,
                block=block,
                position=position,
                before=_text(before, panel.vocabulary),
                token=_text([row["token"]], panel.vocabulary),
                delta_nll=row["delta"],
                kl=row["kl"] if row["kl"] is not None else float("nan"),
            )
            found.append(token)
    return tuple(found)


def _text(ids: list[int], vocabulary: dict[int, str]) -> str:
    """Tokens as text where every one of them is known, else as their ids."""
    if all(token in vocabulary for token in ids):
        return clean("".join(vocabulary[token] for token in ids))
    return " ".join(str(token) for token in ids)
