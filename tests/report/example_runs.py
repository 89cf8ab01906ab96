"""Run directories with plausible numbers, written through the store, for tests of the report.

The numbers have the shape of SmolLM2-135M-Instruct on WikiText in the decode regime, but nothing was measured.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import example_probes
import numpy as np
from example_evals import (
    DENSE_PPL,
    PLANS,
    ExamplePlan,
    generations,
    results,
    summary,
    task_rows,
    throughput,
    timing,
    tokens,
)
from example_profiles import coactivation, depth, heads, histograms, measures, neurons
from safetensors.numpy import save_file

from actsparse.results import (
    EvalRow,
    HeadRow,
    LayerPlan,
    Measure,
    ModelRecord,
    NeuronRow,
    RunKind,
    Sparsity,
    StepBytes,
    TextRecord,
    ThresholdPlan,
    ThroughputRow,
    TimingRow,
    TokenRow,
)
from actsparse.specs import EvalSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store import tables
from actsparse.store.codec import encode, pretty
from actsparse.store.run import RunRequest, RunWriter, open_run

PROMPT = "The lighthouse keeper climbed the stairs for the last time that winter, counting each step aloud."
HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b> & \x1b[31mred\x1b[0m \u202egnp.exe ${x} {{7*7}}"
)

SMOLLM2 = ModelRecord(
    requested="smollm2",
    resolved="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f7",
    model_type="llama",
    activation="silu",
    gated=True,
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    parameters=134_515_008,
    tied_embeddings=True,
    max_positions=8192,
    dtype="float32",
    bytes_per_weight=4.0,
    quantization=None,
    weights_sha256="5a" * 32,
    config_sha256="c0" * 32,
    tokenizer_sha256="70" * 32,
    step=StepBytes(
        layers=30,
        mlp=dict.fromkeys(("gate", "up", "down"), 576 * 1536 * 4),
        projections={"q": 576 * 576 * 4, "k": 576 * 192 * 4, "v": 576 * 192 * 4, "o": 576 * 576 * 4},
        attention=106_168_320,
        head=113_246_208,
        total=538_060_032,
    ),
)
CORPUS = TextRecord(
    role="quality",
    source="wikitext2-test.txt",
    sha256="ab" * 32,
    sequences=4,
    tokens=2048,
    block_length=512,
    prompt_length=256,
    blocks=(0, 4),
)
CALIBRATION = replace(CORPUS, role="calibration", blocks=(4, 8))
PROMPTS = TextRecord(role="prompts", source="sample_prompts/stories.jsonl", sha256="cd" * 32, sequences=3, tokens=620)


def write_run(
    path: Path,
    kind: RunKind,
    fill: Callable[[RunWriter], None],
    *,
    model: ModelRecord | None = SMOLLM2,
    texts: tuple[TextRecord, ...] = (),
    warnings: Iterable[str] = (),
    finish: bool = True,
    key: str = "",
) -> Path:
    """A run directory of `kind`; left unfinished where `finish` is False."""
    name = model.resolved if model else ""
    specs: dict[RunKind, Any] = {
        RunKind.PROFILE: ProfileSpec(model=ModelSpec(name=name)),
        RunKind.PLAN: ThresholdSpec(run=Path("runs/x"), plan="cats@0.5"),
        RunKind.EVAL: EvalSpec(model=ModelSpec(name=name)),
        RunKind.STUDY: EvalSpec(model=ModelSpec(name=name)),
    }
    request = RunRequest(
        kind=kind,
        identity={"path": str(path), "key": key},
        spec=specs[kind],
        model=model,
        texts=texts,
        output=path,
        root=path.parent,
        device="cpu",
        threads=2,
    )
    with open_run(request) as writer:
        command = ("actsparse", {"plan": "threshold", "eval": "evaluate"}.get(kind.value, kind.value), "--model", name)
        writer.manifest = replace(writer.manifest, provenance=replace(writer.manifest.provenance, command=command))
        if not finish:
            (path / "unfinished.json").write_text(pretty(writer.manifest))
        fill(writer)
        for warning in warnings:
            writer.warn(warning)
        if finish:
            writer.finish()
    return path


# Profiles


def profile_run(
    path: Path,
    *,
    model: ModelRecord = SMOLLM2,
    seed: int = 0,
    relu: bool = False,
    finish: bool = True,
    leave_out: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
) -> Path:
    """A profile with every table but those in `leave_out` (`probes`: without the mechanisms)."""

    def fill(writer: RunWriter) -> None:
        random = np.random.default_rng(seed)
        if "measures" not in leave_out:
            probed = [] if "probes" in leave_out else example_probes.measures(model)
            tables.write(path / "measures.parquet", tables.frame(measures(model, random, relu) + probed, Measure))
        if "neurons" not in leave_out:
            tables.write(path / "neurons.parquet", tables.frame(neurons(model, random), NeuronRow))
        if "heads" not in leave_out:
            tables.write(path / "heads.parquet", tables.frame(heads(model, random), HeadRow))
        if "histograms" not in leave_out:
            save_file(histograms(model, random), str(path / "histograms.safetensors"))
        if "probes" not in leave_out:
            save_file(example_probes.matrices(), str(path / "probes.safetensors"))
        if "coactivation" not in leave_out:
            save_file(coactivation(model), str(path / "coactivation.safetensors"))
        (path / "summary.json").write_bytes(encode({"model": model, "run": str(path), "warnings": []}))

    return write_run(
        path,
        RunKind.PROFILE,
        fill,
        model=model,
        texts=(replace(CORPUS, role="profile"),),
        warnings=warnings,
        finish=finish,
    )


# Plans


def plan_run(path: Path, *, model: ModelRecord = SMOLLM2, calibration: TextRecord = CALIBRATION) -> Path:
    """A CATS plan with a threshold in every layer."""
    sparsity = Sparsity(neuron_frac=0.5, mlp_bytes_frac=1 / 3, model_bytes_frac=0.197)
    plan = ThresholdPlan(
        method="cats",
        short="cats@0.5",
        amount=0.5,
        target="sparsity",
        model=model,
        calibration=calibration,
        predicted=sparsity,
        realised=None,
        layers=tuple(
            LayerPlan(layer=layer, width=model.intermediate_size, threshold=0.08 * (1 + 2 * depth(layer, model.layers)))
            for layer in range(model.layers)
        ),
    )
    return write_run(path, RunKind.PLAN, lambda writer: _write_plan(path, plan), model=model, texts=(calibration,))


def _write_plan(path: Path, plan: ThresholdPlan) -> None:
    (path / "plan.json").write_text(pretty(plan))


# Evaluations


def eval_run(
    path: Path,
    *,
    plans: tuple[ExamplePlan, ...] = PLANS,
    model: ModelRecord = SMOLLM2,
    texts: tuple[TextRecord, ...] = (CORPUS, CALIBRATION, PROMPTS),
    warnings: tuple[str, ...] = (),
    dense: float = DENSE_PPL,
    finish: bool = True,
    leave_out: tuple[str, ...] = (),
    prompt: str = PROMPT,
    continuation: str | None = None,
    extra: tuple[EvalRow, ...] = (),
    vocabulary: dict[int, str] | None = None,
) -> Path:
    """An evaluation of `plans` with every table but those in `leave_out`."""

    def fill(writer: RunWriter) -> None:
        random = np.random.default_rng(7)
        if "results" not in leave_out:
            scored = [] if "tasks" in leave_out else task_rows(plans)
            rows = [*results(plans, model, dense), *scored, *extra]
            tables.write(path / "results.parquet", tables.frame(rows, EvalRow))
        if "tokens" not in leave_out:
            tables.write(path / "tokens.parquet", tables.frame(tokens(plans, dense, random), TokenRow))
        if "timing" not in leave_out:
            tables.write(path / "timing.parquet", tables.frame(timing(plans, random), TimingRow))
        if "throughput" not in leave_out:
            tables.write(path / "throughput.parquet", tables.frame(throughput(plans), ThroughputRow))
        if "generations" not in leave_out:
            lines = [encode(generation) for generation in generations(plans, prompt, continuation)]
            (path / "generations.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        if "summary" not in leave_out:
            (path / "summary.json").write_text(json.dumps(summary(path, plans, warnings)))
        if vocabulary is not None:
            (path / "vocabulary.json").write_text(json.dumps(vocabulary))

    return write_run(path, RunKind.EVAL, fill, model=model, texts=texts, warnings=warnings, finish=finish)
