"""The rows of an evaluation's tables, and what its timings allow to say."""

from dataclasses import dataclass
from enum import StrEnum


def path_tolerance(dtype: str) -> float:
    """The largest difference in nats on one token by which engine and masked path of a model may differ.

    In 16 bits it is wider: the engine keeps activations in float32 where the model's own forward rounds them.
    """
    return 5e-2 if dtype.removeprefix("torch.") in ("bfloat16", "float16") else 1e-3


FEWEST_PAIRS = 5  # of dense and sparse laps, for a verdict


class Verdict(StrEnum):
    """What the interval of a speed-up allows to say."""

    FASTER = "faster"
    SLOWER = "slower"
    NOT_SIGNIFICANT = "not significant"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One row of `results.parquet`."""

    plan: str
    metric: str
    param: str = ""
    value: float | None
    unit: str
    n: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of `tokens.parquet`: a scored token of a block under a plan. `nll` and `kl` are in nats.

    `replica` counts the seeds of a random control; 0 for everything else.
    """

    plan: str
    replica: int
    block: int
    position: int
    token: int
    nll: float
    kl: float
    top1: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayerRow:
    """What a plan did to one unit of one layer over one block: the share kept over the sparse positions, and the mean
    local error on dense inputs (`rel_err`) and on the sparse path's own (`rel_err_path`).

    `unit` is `neuron` (errors of the MLP's output), a projection (`q`, `down`, ...: of its own output), or `kv_group`
    (of the output projection's output).
    """

    plan: str
    replica: int
    block: int
    layer: int
    unit: str
    positions: int
    kept_frac: float
    rel_err: float
    rel_err_path: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingRow:
    """One row of `timing.parquet`: one repetition of one phase of one arm of an ABAB pair.

    `arm` is `dense`, `sparse` or `generate` (the model's own generate); `phase` is `prefill`, `select` or `decode`.
    """

    plan: str
    arm: str
    phase: str
    prompt: int
    repetition: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRow:
    """One row of `throughput.parquet`: a number of one plan at one batch size, prompt length and generated length."""

    plan: str
    batch_size: int
    prompt_length: int
    gen_length: int
    metric: str
    value: float | None
    unit: str
    n: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One line of `generations.jsonl`: a greedy continuation under a plan, and where it leaves the dense one.

    `first_divergence` is the first generated position that differs from dense, None when none does; `dense_kl` the mean
    KL(dense || sparse) along the dense continuation, in nats.
    """

    plan: str
    prompt: int
    prompt_text: str
    text: str
    tokens: int
    token_ids: tuple[int, ...] = ()
    first_divergence: int | None
    repetition: float
    dense_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskItemRow:
    """One row of `items.parquet`: what one plan got for one item of a task, by one metric.

    `filter` is how an answer was read from a generated text (empty where there is one way only). `answer` is the index
    chosen, or the text generated; `sparse_tokens` of `scored_tokens` were predicted from a sparse position, the others
    from a dense one.
    """

    plan: str
    replica: int
    task: str
    item: int
    metric: str
    filter: str
    value: float
    answer: str
    gold: str
    scored_tokens: int
    sparse_tokens: int
