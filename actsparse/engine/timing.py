"""Sparse against dense decode: timed in turns, in one process, over the same tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actsparse.core.stats import median_interval
from actsparse.engine import clock
from actsparse.engine.choose import Run
from actsparse.engine.cpu import build
from actsparse.results import FEWEST_PAIRS, Verdict

PREFILL_REPETITIONS = 3
WARM_UP_TOKENS = 4
READINGS = 9
PROBE_PAIRS, PROBE_TOKENS = 5, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One repetition: seconds of one phase of one arm."""

    arm: str
    phase: str
    repetition: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Sparse against dense decode: medians in milliseconds, and the paired ratio dense / sparse with its interval."""

    dense_ms: float
    sparse_ms: float
    dense_prefill_ms: float
    sparse_prefill_ms: float
    select_ms: float
    speedup: float
    low: float
    high: float
    pairs: int

    @property
    def ttft_ms(self) -> float:
        """Time to the first sparse token: prefill while the prompt is watched, then selection and gathering."""
        return self.sparse_prefill_ms + self.select_ms

    @property
    def break_even_tokens(self) -> float | None:
        """Decoded tokens after which watching, selecting and gathering are repaid; None when they never are."""
        saved = self.dense_ms - self.sparse_ms
        return max(0.0, self.ttft_ms - self.dense_prefill_ms) / saved if saved > 0 else None

    @property
    def verdict(self) -> Verdict:
        """What the interval says; too few pairs say nothing."""
        if self.pairs < FEWEST_PAIRS:
            return Verdict.NOT_SIGNIFICANT
        if self.low > 1:
            return Verdict.FASTER
        return Verdict.SLOWER if self.high < 1 else Verdict.NOT_SIGNIFICANT


def summary(laps: Mapping[int, Sequence[Lap]]) -> Speed:
    """Medians over the laps of every prompt; the ratio is taken pair by pair."""
    every = [lap for found in laps.values() for lap in found]
    ratios = [
        dense.seconds / sparse.seconds
        for found in laps.values()
        for dense, sparse in zip(_of(found, "dense", "decode"), _of(found, "sparse", "decode"), strict=True)
    ]
    middle, low, high = median_interval(torch.tensor(ratios, dtype=torch.float64))
    return Speed(
        dense_ms=_median_ms(_of(every, "dense", "decode"), per_token=True),
        sparse_ms=_median_ms(_of(every, "sparse", "decode"), per_token=True),
        dense_prefill_ms=_median_ms(_of(every, "dense", "prefill")),
        sparse_prefill_ms=_median_ms(_of(every, "sparse", "prefill")),
        select_ms=_median_ms(_of(every, "sparse", "select")),
        speedup=middle,
        low=low,
        high=high,
        pairs=len(ratios),
    )


def measure(run: Run, model: PreTrainedModel, ids: Tensor, *, pairs: int, tokens: int) -> list[Lap]:
    """ABAB laps of dense and sparse decode after the prompts `ids` [batch, P], over the same teacher-forced tokens.

    Prefill and selection are timed in the first repetitions; every decode lap starts from the end of the prompts.
    """
    run.prefill(ids, watch=True)
    run.select(tokens)
    run.use(sparse=False)
    stream = dense_stream(run, tokens, ids.device)
    for sparse in (False, True):
        _decode(run, stream[:, :WARM_UP_TOKENS], sparse)
    run.forget()
    laps: list[Lap] = []
    for repetition in range(pairs):
        if repetition < PREFILL_REPETITIONS:
            laps += _prefill_laps(run, model, ids, repetition, tokens)
        for arm, sparse in (("dense", False), ("sparse", True)):
            run.use(sparse=sparse)
            run.rewind()
            seconds = elapsed(model, lambda: run.feed(stream))
            laps.append(Lap(arm=arm, phase="decode", repetition=repetition, tokens=tokens, seconds=seconds))
    run.use(sparse=False)
    return laps


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A short look at whether a plan pays: medians in milliseconds a token, and that of the ratios of pairs.

    `best`: the largest ratio of a pair, the best that was seen of the plan.
    """

    dense_ms: float
    sparse_ms: float
    speedup: float
    best: float

    @property
    def pays(self) -> bool:
        """Whether sparse decode is the faster one in the median pair."""
        return self.speedup > 1

    @property
    def slower(self) -> bool:
        """Whether it is the slower one in every pair: noise alone says so once in 2 ** PROBE_PAIRS times."""
        return self.best < 1

    @property
    def text(self) -> str:
        """What was found, for a warning."""
        medians = f"{self.sparse_ms:.3g} ms a token against {self.dense_ms:.3g} dense, {self.speedup:.2f}x"
        return f"{medians} in the median pair, {self.best:.2f}x in the best"


def probe(run: Run, model: PreTrainedModel) -> Probe:
    """Whether the plan of a run pays, on the prompts prefilled and selected last; the run is then at their end again,
    dense."""
    run.use(sparse=False)
    stream = dense_stream(run, PROBE_TOKENS, model.device)

    def ready(sparse: bool) -> None:
        run.use(sparse=sparse)
        run.rewind()

    found = probe_of(model, lambda _sparse: run.feed(stream), ready=ready, tokens=PROBE_TOKENS)
    run.use(sparse=False)
    run.rewind()
    run.forget()
    return found


def probe_of(
    model: PreTrainedModel,
    decode: Callable[[bool], object],
    *,
    tokens: int,
    ready: Callable[[bool], object] = lambda _sparse: None,
) -> Probe:
    """The same of `decode(sparse)`, which decodes `tokens` tokens, dense and sparse in turns after one of each.

    `ready(sparse)` runs before each lap, and is not timed.
    """
    laps: dict[bool, list[float]] = {False: [], True: []}
    for repetition in range(PROBE_PAIRS + 1):
        for arm, seconds in laps.items():
            ready(arm)
            found = elapsed(model, lambda s=arm: decode(s)) / tokens
            if repetition:
                seconds.append(found)
    dense, sparse = laps[False], laps[True]
    a, b = (torch.tensor(found, dtype=torch.float64) for found in (dense, sparse))
    return Probe(
        dense_ms=float(a.quantile(0.5)) * 1e3,
        sparse_ms=float(b.quantile(0.5)) * 1e3,
        speedup=float((a / b).quantile(0.5)),
        best=float((a / b).max()),
    )


def dense_stream(run: Run, tokens: int, device: torch.device) -> Tensor:
    """The `tokens` tokens [batch, tokens] that dense decode finds after the prompts prefilled last."""
    return torch.tensor(run.generate(tokens), device=device)


def token_laps(run: Run, model: PreTrainedModel, stream: Tensor) -> list[float]:
    """Seconds of every single token of teacher-forced decode, the first being the one after the prompts."""
    run.rewind()
    run.begin(stream)
    return [elapsed(model, run.advance) for _ in range(stream.shape[1])]


def elapsed(model: PreTrainedModel, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, the model's device waited for."""
    return clock.seconds(model.device, work)


def measure_generate(model: PreTrainedModel, ids: Tensor, *, tokens: int, repetitions: int = 2) -> list[Lap]:
    """The model's own `generate` over a fixed number of tokens: seconds of the decode part, prefill taken off."""
    laps = []
    for repetition in range(repetitions + 1):
        short = elapsed(model, lambda: _generate(model, ids, 1))
        whole = elapsed(model, lambda: _generate(model, ids, tokens + 1))
        if repetition:
            seconds = max(0.0, whole - short)
            laps.append(Lap(arm="generate", phase="decode", repetition=repetition, tokens=tokens, seconds=seconds))
    return laps


def _generate(model: PreTrainedModel, ids: Tensor, tokens: int) -> None:
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def _prefill_laps(run: Run, model: PreTrainedModel, ids: Tensor, repetition: int, tokens: int) -> list[Lap]:
    def lap(arm: str, phase: str, work: Callable[[], object]) -> Lap:
        return Lap(arm=arm, phase=phase, repetition=repetition, tokens=ids.shape[1], seconds=elapsed(model, work))

    run.use(sparse=False)
    dense = lap("dense", "prefill", lambda: run.prefill(ids, watch=False))
    watched = lap("sparse", "prefill", lambda: run.prefill(ids, watch=True))
    return [dense, watched, lap("sparse", "select", lambda: run.select(tokens))]


def _decode(run: Run, stream: Tensor, sparse: bool) -> None:
    run.use(sparse=sparse)
    run.rewind()
    run.feed(stream)


def read_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes per second of a reduction that only reads memory that no cache holds: the ceiling of a decode step."""
    if device.type == "cuda":
        from actsparse.engine.cuda.bandwidth import read_bandwidth as on_cuda

        return on_cuda(device)
    buffers = [torch.ones(megabytes << 18, device=device) for _ in range(2)]
    reader = _reader(device)
    seconds = []
    for repetition in range(READINGS):
        buffer = buffers[repetition % 2]
        seconds.append(clock.seconds(device, lambda b=buffer: reader(b)))
    return (megabytes << 20) / float(torch.tensor(seconds[2:], dtype=torch.float64).quantile(0.5))


def _reader(device: torch.device) -> Callable[[Tensor], object]:
    """The best reduction at hand."""
    if device.type == "cpu" and build.failure() is None:
        handle = build.library()
        return lambda buffer: handle.actsparse_read(buffer.data_ptr(), buffer.numel())
    return lambda buffer: buffer.sum().item()


def _of(laps: Sequence[Lap], arm: str, phase: str) -> list[Lap]:
    return [lap for lap in laps if lap.arm == arm and lap.phase == phase]


def _median_ms(laps: list[Lap], per_token: bool = False) -> float:
    seconds = torch.tensor([lap.seconds / (lap.tokens if per_token else 1) for lap in laps], dtype=torch.float64)
    return float(torch.quantile(seconds, 0.5)) * 1e3
