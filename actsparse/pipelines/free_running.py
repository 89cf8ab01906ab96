"""Free-running quality (methods.md, section 7): how far greedy continuations follow the dense ones, and how much a
plan's predictions differ along the dense text. Teacher forcing alone hides how errors add up."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite

import torch

from actsparse.core.bootstrap import bootstrap_mean
from actsparse.methods.short import DENSE
from actsparse.pipelines.continuations import Continuations
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.pipelines.speed import PlanSpeed, Speeds
from actsparse.results import EvalRow, Generation
from actsparse.store.codec import decode, encode
from actsparse.store.files import write_bytes


def along_dense_text(session: Session, groups: Sequence[PlanGroup], speeds: Speeds) -> Speeds:
    """The same, every sample with its mean KL(dense || sparse) along the dense continuation of its prompt; plans that
    were finished before are not repeated."""
    plans = dict(speeds.plans)
    with session.progress.task("following the dense text", len(groups), "plans") as advance:
        for place, group in enumerate(groups):
            found = plans[group.name]
            if found.generations:
                values = _kept(session, place, lambda g=group, one=found: _divergences(session, g, speeds.dense, one))
                samples = [replace(s, dense_kl=value) for s, value in zip(found.generations, values, strict=True)]
                plans[group.name] = replace(found, generations=tuple(samples))
            advance(1)
    return Speeds(speeds.dense, plans)


def free_rows(speeds: Speeds, seed: int) -> list[EvalRow]:
    """Rows of `results.parquet`: tokens until the dense text is left, share of samples that leave it, KL along it, and
    repetition; intervals by bootstrap over prompts."""
    rows = []
    for found in speeds.all:
        samples = found.generations
        if not samples:
            continue
        values = {"repetition": ("share", [one.repetition for one in samples])}
        if found.plan != DENSE:
            dense = {one.prompt: one for one in speeds.dense.generations}
            values |= {
                "exact_match_tokens": ("tokens", [float(matched(one, dense[one.prompt])) for one in samples]),
                "diverged_frac": ("share", [float(one.first_divergence is not None) for one in samples]),
                "dense_text_kl": ("nats", [one.dense_kl for one in samples if one.dense_kl is not None]),
            }
        for metric, (unit, numbers) in values.items():
            rows += _rows(found.plan, metric, unit, numbers, seed)
    return rows


def matched(sample: Generation, dense: Generation) -> int:
    """Leading tokens of a sample that are the dense ones."""
    return dense.tokens if sample.first_divergence is None else sample.first_divergence


def _rows(plan: str, metric: str, unit: str, numbers: list[float], seed: int) -> list[EvalRow]:
    if not numbers:
        return []
    found = bootstrap_mean(torch.tensor(numbers, dtype=torch.float64), seed=seed)
    ends = (("", found.value, found.stderr), ("_low", found.low, None), ("_high", found.high, None))
    return [
        EvalRow(plan=plan, metric=metric + end, value=value, unit=unit, n=found.n, stderr=stderr)
        for end, value, stderr in ends
    ]


def _kept(session: Session, place: int, make: Callable[[], list[float | None]]) -> list[float | None]:
    shard = session.writer.shard(f"free-{place:03d}.json")
    if not shard.exists():
        write_bytes(shard, encode(make()))
    return decode(shard.read_bytes(), list[float | None], str(shard))


def _divergences(session: Session, group: PlanGroup, dense: PlanSpeed, found: PlanSpeed) -> list[float | None]:
    """Mean KL over the tokens of the dense continuation, prompt by prompt; 0 where it is empty, None where it is no
    number."""
    sink = session.texts.quality.record.sink_tokens
    plain = Continuations(session.loaded, None, sink)
    sparse = Continuations(session.loaded, group.plan.gates(), sink)
    texts = {one.prompt: one for one in dense.generations}
    values: list[float | None] = []
    for sample in found.generations:
        prompt = session.texts.prompts.ids[sample.prompt].tolist()
        text = list(texts[sample.prompt].token_ids)
        if not text:
            values.append(0.0)
            continue
        reference, mine = (one.log_probs(prompt, text).log_probs for one in (plain, sparse))
        divergence = float((reference.exp() * (reference - mine)).sum(dim=-1).double().mean())
        values.append(divergence if isfinite(divergence) else None)
    return values
