"""What was asked: the frozen inputs of the four verbs. No torch here.

A field marked `RUNTIME` says how a run is carried out, not what it finds, and stays out of the fingerprint (that of an
evaluation adds device, threads and torch version, since its timing depends on them). A run goes to `output`, else to
`root`/MODEL/KIND-HASH.
"""

from dataclasses import dataclass, field
from pathlib import Path

RUNTIME = {"runtime": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A causal language model: hub id, directory, `.gguf` file, or the alias `smollm2` / `demo`.

    `family`: a TOML file with the row of its family, for a model type that the table lacks. `device_map`: how a model
    larger than one device is spread (`auto`, `balanced`, `sequential`), for profiling and masked evaluation.
    `allow_pickle`: read weights that are kept as pickles only (tensors alone; no code).
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = field(default="auto", metadata=RUNTIME)
    device_map: str | None = field(default=None, metadata=RUNTIME)
    trust_remote_code: bool = False
    offline: bool = field(default=False, metadata=RUNTIME)
    dequantize: bool = False
    family: str | None = None
    allow_pickle: bool = field(default=False, metadata=RUNTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The texts of a run; without `prompts`, `corpus` or `dataset` the shipped sample prompts are used.

    `prompts`: files or folders, one sequence a prompt. `corpus`: one text cut into blocks of `block_length` tokens, of
    which the first `prompt_length`, or the share `prompt_frac`, are the dense prompt (a share of 0: the sink tokens
    alone). `limit`: how many sequences or blocks. `calib_blocks`: the
    half-open range of blocks that methods are fitted on (default N:2N). `part` keeps every sequence, or only those at
    even or odd places (`actsparse run` splits its text that way).
    """

    prompts: tuple[str, ...] = ()
    corpus: str | None = None
    calib: str | None = None
    dataset: str | None = None
    split: str = "test"
    text_column: str = "text"
    limit: int | None = None
    block_length: int | None = None
    prompt_length: int | None = None
    prompt_frac: float | None = None
    calib_blocks: tuple[int, int] | None = None
    sink_tokens: int = 4
    part: str = "all"
    seed: int = 0


HEAD_NORM, ATTENTION_ENTROPY = "head_norm", "attention_entropy"
DUMP_KINDS = ("neuron", "gate", "up", "mlp_in", "attn_in", "attn_out", HEAD_NORM, ATTENTION_ENTROPY)


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpSpec:
    """Raw activations of the first `tokens` recorded positions: `layers` (None: all recorded ones) and `kinds`, those
    of `DUMP_KINDS` (`head_norm`: output norm of every head; `attention_entropy`: of every head, in nats)."""

    layers: tuple[int, ...] | None
    kinds: tuple[str, ...]
    tokens: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSpec:
    """Record activations of `model` on `data`.

    `layers`: those recorded (None: all). `cett_targets`: CETT levels solved exactly. `reservoir_tokens` and
    `reservoir_mb` bound the sample of token positions that is kept for replays. `probes`: the mechanisms measured
    beside (`uncertainty`, `inertia`, `union`, `gradients`; `default`: the first three as far as the text allows,
    `cheap`: the same for small models alone); `masks`: the kinds of mask that they compare (`topk`, `cett`, `exact`).
    `decode`: that many tokens which the model itself writes after each
    prompt are recorded too, as a phase of their own. `dump`: activations written token by token. `strict`: activations
    that are not finite are an error.
    """

    model: ModelSpec
    data: DataSpec = DataSpec()
    layers: tuple[int, ...] | None = None
    cett_targets: tuple[float, ...] = (0.1, 0.2, 0.3)
    reservoir_tokens: int = 4096
    reservoir_mb: int = 512
    probes: tuple[str, ...] = ()
    masks: tuple[str, ...] = ("topk",)
    decode: int = 0
    dump: DumpSpec | None = None
    strict: bool = field(default=False, metadata=RUNTIME)
    batch_size: int | None = field(default=None, metadata=RUNTIME)
    output: Path | None = field(default=None, metadata=RUNTIME)
    root: Path = field(default=Path("runs"), metadata=RUNTIME)
    force: bool = field(default=False, metadata=RUNTIME)
    resume: bool = field(default=True, metadata=RUNTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdSpec:
    """Derive a plan from the profile run in `run`.

    `plan` is the method in the short form `method[:key=value,...][@x]`. One target may give the amount instead of
    `@x`: a `sparsity` on a `basis` (`unit`: the method's own units; `neuron`, `mlp-bytes`, `model-bytes`), a
    `target_error` of every layer, a relative `target_ppl_increase` in the decode regime on the calibration text, or a
    `target_speedup` through the byte model. `transfer` is another text (a file) on which the plan's sparsity and errors
    are measured. `export` is a folder to which a static plan is written as a smaller checkpoint.
    """

    run: Path
    plan: str
    sparsity: float | None = None
    basis: str = "unit"
    target_error: float | None = None
    target_ppl_increase: float | None = None
    target_speedup: float | None = None
    transfer: str | None = None
    export: Path | None = field(default=None, metadata=RUNTIME)
    device: str = field(default="auto", metadata=RUNTIME)
    offline: bool = field(default=False, metadata=RUNTIME)
    output: Path | None = field(default=None, metadata=RUNTIME)
    root: Path = field(default=Path("runs"), metadata=RUNTIME)
    force: bool = field(default=False, metadata=RUNTIME)
    resume: bool = field(default=True, metadata=RUNTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """Quality and speed of `plans` (short forms or plan directories) against dense.

    With `controls`, random and static pruning at the densities of the plans are evaluated beside them.
    `timing_pairs` ABAB pairs of `timing_tokens` decoded tokens give a speed-up; 0 pairs leaves timing out.
    `generations` prompts are continued by `max_new_tokens` tokens, dense and sparse, as samples: greedily, or with a
    `temperature` above 0 drawn from the fewest tokens that hold `top_p`, by the same random numbers under every plan.
    `task_files` are tasks as JSON lines, `tasks` those of lm-eval, also from the folder `include_path`: `task_limit`
    items each after `shots` examples, answers of at most `task_tokens` tokens; the last `dense_upto` tokens of a
    context run sparse too.
    With `fast_atomics` engines that can add partial sums in any order: faster, and not to the same bits each time.
    With `throughput`, dense and every plan are timed at all `batch_sizes`, `prompt_lengths` and `gen_lengths`.
    """

    model: ModelSpec
    data: DataSpec = DataSpec()
    plans: tuple[str, ...] = ()
    max_new_tokens: int = 48
    generations: int = 3
    temperature: float = 0.0
    top_p: float = 1.0
    timing_pairs: int = 7
    timing_tokens: int = 12
    timing_prompts: int = 1
    fast_atomics: bool = False
    path_check_tokens: int = 8
    controls: bool = True
    task_files: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    task_limit: int | None = None
    task_tokens: int = 256
    shots: int = 0
    dense_upto: int = 0
    throughput: bool = False
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    prompt_lengths: tuple[int, ...] = (128, 512, 2048)
    gen_lengths: tuple[int, ...] = (32, 128, 512)
    max_ppl_increase: float | None = field(default=None, metadata=RUNTIME)
    min_top1: float | None = field(default=None, metadata=RUNTIME)
    output: Path | None = field(default=None, metadata=RUNTIME)
    root: Path = field(default=Path("runs"), metadata=RUNTIME)
    force: bool = field(default=False, metadata=RUNTIME)
    resume: bool = field(default=True, metadata=RUNTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """The experiments of a paper on one model: `study` is pitfalls, moyu, tda, frontier, window or union.

    `counterpart` is the model with the other activation that some experiments compare with. `only` names the
    experiments to run (empty: all); `quick` takes the small sizes.
    """

    study: str
    model: ModelSpec
    counterpart: ModelSpec | None = None
    data: DataSpec = DataSpec()
    only: tuple[str, ...] = ()
    quick: bool = False
    output: Path | None = field(default=None, metadata=RUNTIME)
    root: Path = field(default=Path("runs"), metadata=RUNTIME)
    force: bool = field(default=False, metadata=RUNTIME)
    resume: bool = field(default=True, metadata=RUNTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSpec:
    """One HTML file from run directories; the first is the reference."""

    runs: tuple[Path, ...]
    output: Path = Path("report.html")
    title: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """The four verbs in a row: even sequences are profiled and fitted on, odd ones evaluated."""

    model: ModelSpec
    data: DataSpec = DataSpec()
    plans: tuple[str, ...] = ("griffin@0.5", "cats@0.5")
    probes: tuple[str, ...] = ("cheap",)
    target_error: float = 0.2
    timing_pairs: int = 7
    output: Path = Path("runs")
    force: bool = False
