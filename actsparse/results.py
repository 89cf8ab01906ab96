"""What was found: the frozen outputs that flow between stages and onto disk. No torch here.

Sparsity is always given on a named basis: `neuron_frac` (neurons dropped), `channel_frac` (input channels dropped,
weighted by parameters), `mlp_bytes_frac` and `model_bytes_frac` (weight bytes of one decode step not read).
"""

from dataclasses import dataclass, field
from enum import StrEnum

SCHEMA_VERSION = 2


def path_tolerance(dtype: str) -> float:
    """The largest difference in nats on one token by which engine and masked path of a model may differ.

    In 16 bits it is wider: the engine keeps activations in float32 where the model's own forward rounds them.
    """
    return 5e-2 if dtype.removeprefix("torch.") in ("bfloat16", "float16") else 1e-3


class SiteKind(StrEnum):
    """Where an activation is read. Every family presents each as [batch, seq, width].

    `attn_in`: input of the query projection; `attn_out`: input of the output projection (concatenated heads);
    `mlp_in`: input of the MLP; `gate`: output of the activation function; `up`: output of the up projection;
    `neuron`: input of the down projection; `kv`: keys and values; `router`: the logits of a mixture of experts.
    """

    ATTN_IN = "attn_in"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    GATE = "gate"
    UP = "up"
    NEURON = "neuron"
    KV = "kv"
    ROUTER = "router"


SHARED_EXPERT = -1
"""The number of the expert that serves every token, beside the routed ones (counted from 0)."""


class Unit(StrEnum):
    """What is kept or dropped: neurons of an MLP, input channels of a projection (fused ones are `qkv`, `gate_up`), or
    KV groups of heads."""

    NEURON = "neuron"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    O = "o"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    KV_GROUP = "kv_group"

    @property
    def is_projection(self) -> bool:
        """Whether the units are input channels of a projection."""
        return self not in (Unit.NEURON, Unit.KV_GROUP)


class KvPolicy(StrEnum):
    """What becomes of the keys and values of a head that is dropped at a token (methods.md, section 3)."""

    COMPUTE_ALL = "compute_all"
    DROP = "drop"
    ZERO = "zero"
    LAZY = "lazy"
    COPY_PREV = "copy_prev"


# The phases of a profile: what a prompt's tokens activate, and what the tokens that the model writes itself do.
PREFILL, DECODE = "prefill", "decode"


class RunKind(StrEnum):
    PROFILE = "profile"
    PLAN = "plan"
    EVAL = "eval"
    STUDY = "study"


class ClaimVerdict(StrEnum):
    """Whether what a paper claims was found on this model; `undecided` where the interval leaves it open."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


class PanelKind(StrEnum):
    """How the rows of a panel are meant to be drawn: `line` over x, `bar` over labels, `table` of series by label."""

    LINE = "line"
    BAR = "bar"
    TABLE = "table"


FEWEST_PAIRS = 5  # of dense and sparse laps, for a verdict


class Verdict(StrEnum):
    """What the interval of a speed-up allows to say."""

    FASTER = "faster"
    SLOWER = "slower"
    NOT_SIGNIFICANT = "not significant"


def param(**values: object) -> str:
    """The `param` column: `key=value[,key=value]`, keys sorted (a trailing underscore of a key is dropped)."""
    texts = {key.rstrip("_"): f"{v:g}" if isinstance(v, float) else str(v) for key, v in values.items()}
    return ",".join(f"{key}={texts[key]}" for key in sorted(texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place where activations are read: one kind in one layer, and in one of its experts where it has some."""

    layer: int
    kind: SiteKind
    expert: int | None = None

    @property
    def name(self) -> str:
        """The kind, `shared_KIND` in the expert that serves every token."""
        return f"shared_{self.kind}" if self.expert == SHARED_EXPERT else str(self.kind)

    @classmethod
    def named(cls, layer: int, name: str) -> "Site":
        """The site of a layer that has this `name`."""
        expert = SHARED_EXPERT if name.startswith("shared_") else None
        return cls(layer=layer, kind=SiteKind(name.removeprefix("shared_")), expert=expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A number with its unit; `stderr` is None when it was not estimated."""

    value: float | None
    unit: str
    n: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One row of `measures.parquet`: a measured value of a layer (None: the whole model) and a kind."""

    metric: str
    layer: int | None = None
    kind: str | None = None
    param: str = ""
    value: float | None
    unit: str
    n: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronRow:
    """One row of `neurons.parquet`, over the recorded tokens.

    `active_frac`: share of tokens in which the neuron is in the top 20 % of its layer by |a|*||w||; `nonzero_frac`:
    share with a != 0; `mean_norm`: mean |a|*||w||; `griffin`: sqrt(mean (a/||a||)^2). In a mixture of experts a row
    belongs to a neuron of one `expert` (-1: the shared one), over the `tokens` that were routed to it.
    """

    layer: int
    neuron: int
    active_frac: float
    nonzero_frac: float
    mean_abs: float
    max_abs: float
    mean_norm: float
    griffin: float
    mean: float
    mean_square_up: float | None
    expert: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """One row of `heads.parquet`: mean output norm of a head or KV group, and its share of the layer's total."""

    layer: int
    unit: str
    index: int
    mean_norm: float
    share: float


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
class StepBytes:
    """Weight bytes that one dense batch-1 decode step reads (methods.md, section 0).

    `mlp`: bytes of each MLP matrix of one layer (`gate`, `up`, `down`; no `gate` in a non-gated FFN; of experts, those
    that one token reads, and the mean where layers differ); `projections`: those of each attention matrix of one layer
    (`q`, `k`, `v`, `o`; parts of a fused one by their rows); `attention` and `head` over the whole model; `total`: all
    parameters once, a tied embedding being the lm_head, less an untied input embedding.
    """

    layers: int
    mlp: dict[str, int]
    projections: dict[str, int]
    attention: int
    head: int
    total: int

    @property
    def mlp_total(self) -> int:
        return self.layers * sum(self.mlp.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRecord:
    """The mixtures of experts of a model: in `layers`, `count` experts of `width` neurons, of which `top_k` serve a
    token, beside a shared one of `shared_width` neurons (None: there is none)."""

    layers: tuple[int, ...]
    count: int
    top_k: int
    width: int
    shared_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnPlace:
    """One feed-forward network of a model: a layer's MLP (`expert` None), or one of its experts.

    `share`: its part of the MLP bytes of its layer that one token reads, on average over experts.
    """

    layer: int
    expert: int | None
    width: int
    share: float


def ffn_places(layers: int, width: int, experts: ExpertsRecord | None) -> tuple[FfnPlace, ...]:
    """The FFNs of a model in order: one a dense layer of `width` neurons, one an expert in its other layers."""
    if experts is None:
        return tuple(FfnPlace(layer=layer, expert=None, width=width, share=1.0) for layer in range(layers))
    read = experts.top_k * experts.width + (experts.shared_width or 0)
    each = experts.top_k * experts.width / experts.count / read
    mixed = [(expert, experts.width, each) for expert in range(experts.count)]
    if experts.shared_width is not None:
        mixed.append((SHARED_EXPERT, experts.shared_width, experts.shared_width / read))
    return tuple(
        FfnPlace(layer=layer, expert=expert, width=size, share=share)
        for layer in range(layers)
        for expert, size, share in (mixed if layer in experts.layers else [(None, width, 1.0)])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A loaded model: the name that was asked for, what it resolved to, its shape, and hashes of its content.

    `family_sha256`: the hash of the row that was brought for it, None where the table has one.
    """

    requested: str
    resolved: str
    revision: str | None
    model_type: str
    activation: str
    gated: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    tied_embeddings: bool
    max_positions: int | None
    dtype: str
    bytes_per_weight: float
    step: StepBytes
    quantization: str | None
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    experts: ExpertsRecord | None = None
    family_sha256: str | None = None

    @property
    def ffns(self) -> tuple[FfnPlace, ...]:
        """Its feed-forward networks in order."""
        return ffn_places(self.layers, self.intermediate_size, self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """A text that was read: where from, how it was cut, and the hash of the token ids that it became.

    `sequences` blocks or prompts of `tokens` tokens in all; for blocks `block_length`, `prompt_length` and the
    half-open range `blocks`. `window_hashes` are a sample of 16-token windows, by which two texts are seen to overlap.
    """

    role: str
    source: str
    sha256: str
    sequences: int
    tokens: int
    block_length: int | None = None
    prompt_length: int | None = None
    blocks: tuple[int, int] | None = None
    sink_tokens: int = 4
    window_hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Shares not used in a decode step, each on its own basis; None where a basis does not apply.

    `neuron_frac`: neurons; `channel_frac`: input channels, weighted by the bytes of the projections; `head_frac`: KV
    groups of heads.
    """

    neuron_frac: float | None
    mlp_bytes_frac: float
    model_bytes_frac: float
    channel_frac: float | None = None
    head_frac: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What a plan does to one unit of one layer: how many of `width` are kept (None: decided at run time), its
    threshold, and the share that it is predicted to drop.

    `recall`: share of the units in use that a trained router found on held-out tokens, and the same corrected for
    chance; `epoch`: the epoch of training that it is from. None without a router, or where it was trained elsewhere.
    `rule`: whose rule it is, in a mix of several methods.
    """

    layer: int
    unit: Unit = Unit.NEURON
    width: int
    kept: int | None = None
    threshold: float | None = None
    dropped: float | None = None
    rule: str | None = None
    recall: float | None = None
    recall_corrected: float | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """What a plan did to one unit of one layer on a text: the share dropped, and the mean relative error of the output
    on dense inputs."""

    layer: int
    unit: Unit
    dropped: float
    rel_err: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPlan:
    """What a plan did on a text at positions P..S-1 of its blocks, on dense activations: sparsity on every basis, the
    mean of the layers' relative errors, and every layer."""

    text: TextRecord
    realised: Sparsity
    rel_err: float
    layers: tuple[MeasuredLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdPlan:
    """A method fitted to a model: everything but its tensors (`plan.json`; tensors in `plan.safetensors`).

    `short` is the form as typed, or what a target was solved to. `predicted` sparsity follows from the fit, `realised`
    was counted on the calibration text (None where a method decides at run time and was not replayed). `measured`:
    what it did to calibration blocks, and to the transfer text, where these were run.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    short: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    amount: float | None
    target: str
    model: ModelRecord
    calibration: TextRecord | None
    predicted: Sparsity
    realised: Sparsity | None
    layers: tuple[LayerPlan, ...]
    measured: tuple[MeasuredPlan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Who made a run, with what, when and where."""

    actsparse: str
    python: str
    packages: dict[str, str]
    platform: str
    processor: str
    device: str
    threads: int
    git_commit: str | None
    command: tuple[str, ...]
    started: str
    finished: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`, written last: a directory that has one is complete."""

    schema_version: int = SCHEMA_VERSION
    kind: RunKind
    status: str
    fingerprint: str
    identity: dict[str, object]
    spec: dict[str, object]
    model: ModelRecord | None
    texts: tuple[TextRecord, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    files: tuple[FileRecord, ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One row of `studies.parquet`: a point of one series in one panel of an experiment.

    `x` is the place on a numeric axis (None where `label` is the place); `low` and `high` bound the 95 % interval.
    """

    study: str
    experiment: str
    panel: str
    series: str
    x: float | None
    label: str
    value: float | None
    unit: str
    n: int
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPanel:
    """One figure or table of an experiment; titles of the axes carry their units.

    `layers`: x counts layers. `log_x`, `log_y`: axes that are meant to be logarithmic. `reference`: a level to draw
    (dense, chance).
    """

    name: str
    title: str
    kind: PanelKind
    x_title: str
    y_title: str
    layers: bool = False
    log_x: bool = False
    log_y: bool = False
    reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyExperiment:
    """One experiment of a study: what the paper claims, what was found, and how it is drawn.

    `conclusion` is one sentence with the number and its interval, which `value`, `low`, `high` and `unit` repeat.
    `quick` says that it ran at the small size. `settings` are the sizes that it ran at; `notes` what weakens it.
    """

    study: str
    experiment: str
    title: str
    source: str
    claim: str
    conclusion: str
    verdict: ClaimVerdict
    value: float | None
    low: float | None
    high: float | None
    unit: str
    quick: bool
    panels: tuple[StudyPanel, ...]
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
