"""Throughput runs: dense and every plan at several batch sizes, prompt lengths and generated lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from actsparse.engine import timing
from actsparse.engine.choose import Engines, Run
from actsparse.engine.memory import peak_bytes, reset_peak
from actsparse.errors import ModelError, PlanError
from actsparse.methods.short import DENSE
from actsparse.pipelines.halving import halving
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.pipelines.unread import unread_by_engine
from actsparse.results import ThroughputRow

ROUNDS = 3
QUANTILES = {"ms_p50": 0.5, "ms_p90": 0.9, "ms_p99": 0.99}


@dataclass
class _Arm:
    """What the rounds of one arm showed: seconds of prefill and selection, and of every token of every round; the most
    memory held in any round, in bytes."""

    prefill: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)
    memory: int = 0

    def decode(self, count: int) -> list[float]:
        """Seconds of the first `count` tokens, round by round."""
        return [sum(laps[:count]) for laps in self.tokens]


def measure_throughput(session: Session, groups: Sequence[PlanGroup], read_bandwidth: float) -> list[ThroughputRow]:
    """Every named plan beside dense, in turns over the same teacher-forced tokens, at every combination asked for.

    A batch that memory does not suffice for is measured at half its size. What does not fit the model's context, or in
    half a batch either, and plans that no engine runs, are left out with a warning.
    """
    spec = session.spec
    shapes = [shape for shape in product(spec.batch_sizes, spec.prompt_lengths) if _fits(session, shape[1])]
    named = [group for group in groups if group.named]
    engines = Engines(session.loaded.sites, session.progress.note, fast_atomics=spec.fast_atomics)
    rows: list[ThroughputRow] = []
    with session.progress.task("throughput", len(shapes) * max(1, len(named)), "runs") as advance:
        for batch, prompt in shapes:
            for group in named or [None]:
                rows += _rows_or_why_not(session, engines, group, batch, prompt, read_bandwidth)
                advance(1)
    return _without_repeats(rows)


def _rows_or_why_not(
    session: Session, engines: Engines, group: PlanGroup | None, batch: int, prompt: int, read_bandwidth: float
) -> list[ThroughputRow]:
    """The rows of one plan at a batch size, or at half of it; none, and a warning, where that cannot be run."""

    def attempt(half: int | None) -> list[ThroughputRow]:
        return _one(session, engines, group, _prompts(session, half or batch, prompt), read_bandwidth)

    try:
        return halving(attempt, None, batch, session)
    except (PlanError, ModelError) as error:
        name = DENSE if group is None else group.name
        session.warn(f"{name} at batch {batch}, prompt {prompt}: no throughput ({error.what})")
        return []


def _one(
    session: Session, engines: Engines, group: PlanGroup | None, ids: Tensor, read_bandwidth: float
) -> list[ThroughputRow]:
    """The rows of dense and of one plan (None: dense alone) on prompts ids [batch, prompt]."""
    spec = session.spec
    batch, prompt = ids.shape
    longest = max(spec.gen_lengths)
    gates = [] if group is None else group.plan.gates()
    sink = session.texts.quality.record.sink_tokens
    rows: list[ThroughputRow] = []
    with engines.open(gates, sink_tokens=sink, max_length=prompt + longest + 2, batch=batch) as run:
        run.use(sparse=False)
        run.prefill(ids, watch=bool(gates))
        stream = timing.dense_stream(run, longest, ids.device)
        run.select(longest)
        for gens in _alike(spec.gen_lengths, run.break_even):
            arms = _timed(session, group, run, ids, stream[:, : max(gens)])
            unread = _unread(session, group, run)
            for gen, (name, arm) in product(gens, arms.items()):
                share = 0.0 if name == DENSE else unread
                step_bytes = None
                if share is not None:
                    step_bytes = session.cost.total * (1 - share) + _cache_bytes(session, batch, prompt + gen / 2)
                rows += _rows(name, arm, arms[DENSE], batch, prompt, gen, step_bytes, read_bandwidth)
            if group is not None:
                _say_whether_it_pays(session, group.name, arms, batch, prompt, max(gens))
        announced = run.announced
    for text in announced:
        session.warn(f"throughput at batch {batch}: {text}")
    return rows


def _alike(gen_lengths: Sequence[int], break_even: float | None) -> list[list[int]]:
    """Lengths at which what is kept is read alike: those that do not repay copies of it, and those that do."""
    short = [gen for gen in gen_lengths if break_even is not None and gen <= break_even]
    return [some for some in (short, [gen for gen in gen_lengths if gen not in short]) if some]


def _timed(
    session: Session, group: PlanGroup | None, run: Run, ids: Tensor, stream: Tensor
) -> dict[str, _Arm]:  # fmt: skip
    """Rounds of dense and of one plan, in turns, over the tokens stream [batch, count]."""
    model, count = session.loaded.model, stream.shape[1]
    arms = {DENSE: _Arm()} if group is None else {DENSE: _Arm(), group.name: _Arm()}
    run.select(count)
    for name in arms:  # warm up
        run.use(sparse=name != DENSE)
        run.rewind()
        run.feed(stream[:, :4])
    run.forget()
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            sparse = name != DENSE
            reset_peak(model.device)
            run.use(sparse=False)
            arm.prefill.append(timing.elapsed(model, lambda w=sparse: run.prefill(ids, watch=w)))
            arm.select.append(timing.elapsed(model, lambda: run.select(count)) if sparse else 0.0)
            run.use(sparse=sparse)
            arm.tokens.append(timing.token_laps(run, model, stream))
            arm.memory = max(arm.memory, peak_bytes(model.device))
    return arms


def _rows(
    name: str, arm: _Arm, dense: _Arm, batch: int, prompt: int, gen: int, step_bytes: float | None,
    read_bandwidth: float,
) -> list[ThroughputRow]:  # fmt: skip
    each = torch.tensor([lap for laps in arm.tokens for lap in laps[:gen]], dtype=torch.float64) * 1e3
    prefill, select = _median(arm.prefill), _median(arm.select)
    decode, base = _median(arm.decode(gen)), _median(dense.decode(gen))
    ratios = [one / two for one, two in zip(dense.decode(gen), arm.decode(gen), strict=True)]
    saved_per_token = (base - decode) / gen
    extra = prefill + select - _median(dense.prefill)
    rate = None if step_bytes is None else step_bytes / (float(each.quantile(0.5)) / 1e3)
    values: dict[str, tuple[float | None, str]] = {
        "tokens_per_s": (batch * gen / (prefill + select + decode), "tokens/s"),
        "decode_tokens_per_s": (batch * gen / decode, "tokens/s"),
        **{metric: (float(each.quantile(q)), "ms") for metric, q in QUANTILES.items()},
        "ttft_ms": ((prefill + select) * 1e3, "ms"),
        "select_ms": (select * 1e3, "ms"),
        "memory_mb": (arm.memory / 2**20, "MiB"),
        "gb_per_s": (None if rate is None else rate / 1e9, "GB/s"),
        "ceiling_share": (None if rate is None else rate / read_bandwidth, "share"),
    }
    if name != DENSE:
        values["speedup"] = (_median(ratios), "1")
        even = max(0.0, extra) / saved_per_token if saved_per_token > 0 else None
        values["break_even_tokens"] = (even, "tokens")
    return [
        ThroughputRow(
            plan=name, batch_size=batch, prompt_length=prompt, gen_length=gen, metric=metric, value=value, unit=unit,
            n=len(each),
        )
        for metric, (value, unit) in values.items()
    ]  # fmt: skip


def _say_whether_it_pays(session: Session, name: str, arms: dict[str, _Arm], batch: int, prompt: int, gen: int) -> None:
    ratios = [dense / sparse for dense, sparse in zip(arms[DENSE].decode(gen), arms[name].decode(gen), strict=True)]
    if _median(ratios) < 1:
        session.warn(
            f"{name} does not pay at batch {batch}, prompt {prompt}: {_median(ratios):.2f}x of dense; run dense there"
        )


def _unread(session: Session, group: PlanGroup | None, run: Run) -> float | None:
    """The share of a step's weight bytes that the engine did not read; None where it does not know.

    A share that was fitted or measured elsewhere does not stand in: an engine may read a kept row once a sequence, the
    rows that any sequence keeps, or all of them.
    """
    if group is None:
        return 0.0
    counted = unread_by_engine(group.plan.layer_gates(), run.kept(), session.cost)
    return None if counted is None else counted.model_bytes_frac


def _cache_bytes(session: Session, batch: int, position: float) -> float:
    """Bytes of keys and values that a step reads on average."""
    record = session.loaded.record
    size = next(session.loaded.model.parameters()).element_size()
    return 2 * record.layers * record.kv_heads * record.head_dim * size * batch * position


def _prompts(session: Session, batch: int, length: int) -> Tensor:
    """ids [batch, length]: stretches of the run's own text, repeated where it is too short."""
    texts = session.texts
    stream = torch.cat([one.flatten() for one in (*texts.quality.ids, *texts.prompts.ids)])
    needed = batch * length
    stream = stream.repeat(-(-needed // len(stream)))[:needed]
    return stream.view(batch, length).to(session.loaded.device)


def _fits(session: Session, prompt: int) -> bool:
    limit, longest = session.loaded.record.max_positions, max(session.spec.gen_lengths)
    if limit is None or prompt + longest + 2 <= limit:
        return True
    session.warn(
        f"no throughput at prompt {prompt}: with {longest} new tokens it passes the model's context of {limit}"
    )
    return False


def _without_repeats(rows: list[ThroughputRow]) -> list[ThroughputRow]:
    """Dense stands beside every plan: its first measurement of a shape is kept."""
    found: dict[tuple[str, int, int, int, str], ThroughputRow] = {}
    for row in rows:
        found.setdefault((row.plan, row.batch_size, row.prompt_length, row.gen_length, row.metric), row)
    return list(found.values())


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
