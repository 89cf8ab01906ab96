"""The only place that measures time: sparse against dense, in turns, in one process, over the same tokens."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from actsparse.core.stats import median_interval
from actsparse.engine.decode import forced, greedy, new_cache, prefill
from actsparse.engine.sparse import SparseDecoder
from actsparse.results import Verdict

PREFILL_REPETITIONS = 3
WARM_UP_TOKENS = 4
FEWEST_PAIRS = 5


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


def measure(model: PreTrainedModel, decoder: SparseDecoder, ids: Tensor, *, pairs: int, tokens: int) -> list[Lap]:
    """ABAB laps of dense and sparse decode after the prompt `ids` [1, P], over the same teacher-forced tokens.

    Prefill and selection are timed in the first repetitions; every decode lap starts from a copy of its own cache.
    """
    decoder.dense()
    start, length = ids.shape[1], ids.shape[1] + tokens + 1
    dense_cache = new_cache(model, length)
    logits = prefill(model, ids, dense_cache)
    stream = greedy(model, logits, deepcopy(dense_cache), start, tokens)
    laps: list[Lap] = []
    sparse_cache = new_cache(model, length)
    decoder.prefill(ids, sparse_cache)
    decoder.select()
    for cache, sparse in ((dense_cache, False), (sparse_cache, True)):
        _decode(model, decoder, stream[:, :WARM_UP_TOKENS], deepcopy(cache), start, sparse)
    for repetition in range(pairs):
        if repetition < PREFILL_REPETITIONS:
            laps += _prefill_laps(model, decoder, ids, length, repetition)
        for arm, cache in (("dense", dense_cache), ("sparse", sparse_cache)):
            fresh = deepcopy(cache)
            seconds = _seconds(model, lambda a=arm, c=fresh: _decode(model, decoder, stream, c, start, a == "sparse"))
            laps.append(Lap(arm=arm, phase="decode", repetition=repetition, tokens=tokens, seconds=seconds))
    return laps


def measure_generate(model: PreTrainedModel, ids: Tensor, *, tokens: int, repetitions: int = 2) -> list[Lap]:
    """The model's own `generate` over a fixed number of tokens: seconds of the decode part, prefill taken off."""
    laps = []
    for repetition in range(repetitions + 1):
        short = _seconds(model, lambda: _generate(model, ids, 1))
        whole = _seconds(model, lambda: _generate(model, ids, tokens + 1))
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


def _prefill_laps(
    model: PreTrainedModel, decoder: SparseDecoder, ids: Tensor, length: int, repetition: int
) -> list[Lap]:
    def lap(arm: str, phase: str, run: Callable[[], object]) -> Lap:
        return Lap(arm=arm, phase=phase, repetition=repetition, tokens=ids.shape[1], seconds=_seconds(model, run))

    decoder.dense()
    dense = lap("dense", "prefill", lambda: prefill(model, ids, new_cache(model, length)))
    watched = lap("sparse", "prefill", lambda: decoder.prefill(ids, new_cache(model, length)))
    return [dense, watched, lap("sparse", "select", decoder.select)]


def _decode(
    model: PreTrainedModel, decoder: SparseDecoder, stream: Tensor, cache: Cache, start: int, sparse: bool
) -> None:
    if sparse:
        decoder.sparse()
    else:
        decoder.dense()
    forced(model, stream, cache, start)


def _seconds(model: PreTrainedModel, run: Callable[[], object]) -> float:
    _synchronize(model)
    began = time.perf_counter()
    run()
    _synchronize(model)
    return time.perf_counter() - began


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _of(laps: Sequence[Lap], arm: str, phase: str) -> list[Lap]:
    return [lap for lap in laps if lap.arm == arm and lap.phase == phase]


def _median_ms(laps: list[Lap], per_token: bool = False) -> float:
    seconds = torch.tensor([lap.seconds / (lap.tokens if per_token else 1) for lap in laps], dtype=torch.float64)
    return float(torch.quantile(seconds, 0.5)) * 1e3
