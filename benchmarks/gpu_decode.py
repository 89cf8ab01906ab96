"""Decode speed on one GPU against the byte limit measured in the same run, correctness first.

    python benchmarks/gpu_decode.py --parts check,generate,dense,sliced,cats,teal,gemv,shapes

Random weights of the Llama-2-7B shape, batch 1, bfloat16, a cache of 1024 with 512 live positions, CUDA-graph replay,
teacher-forced tokens, dense and sparse in turn. Prints one table; with $OUT set, writes it as JSON there too.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from gpu_calibrate import fit_inputs, fit_neurons, realised_inputs, realised_neurons
from gpu_timing import Paired, elapsed_ms, median_ms, paired, replay_of
from torch import Tensor

from actsparse.engine.cuda.bandwidth import read_bandwidth
from actsparse.engine.cuda.engine import decoder_of
from actsparse.engine.cuda.native_step import NativeStep
from actsparse.engine.cuda.operators import Epilogue, Norm, Operators, Tuning
from actsparse.engine.step import sliced
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan
from actsparse.engine.step.weights import (
    SHAPES,
    InputRows,
    Shape,
    Weights,
    input_rows,
    random_weights,
    share_storage,
    transpose_rows,
    weights_from_model,
)

LENGTH, POSITION, STEPS, GENERATED = 1024, 512, 24, 16
PARTS = ("check", "generate", "dense", "sliced", "cats", "teal", "gemv", "shapes", "profile", "compiled", "tune")
DEFAULT_PARTS = "check,generate,dense,sliced,cats,teal,gemv,shapes,profile"
GEMV_SHAPES = ((4096, 11008), (11008, 4096), (4096, 4096), (4096, 14336))
GEMV_TARGETS = {0.5: (1.0, 1.1), 0.7: (1.2, 1.3), 0.9: (1.6, 2.2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measured number; `must` and `aim` bound it from below, or from above for times."""

    name: str
    value: float
    unit: str
    must: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        def reached(bound: float) -> bool:
            return self.value <= bound if self.unit in ("ms", "us") else self.value >= bound

        if self.must is None or self.aim is None:
            return ""
        return "aim" if reached(self.aim) else "must" if reached(self.must) else "MISSED"


@dataclass(slots=True)
class Report:
    """What the run found, and which parts failed."""

    lines: list[Line] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bandwidth: float = 0.0

    def add(self, name: str, value: float, unit: str, **more) -> None:
        line = Line(name=name, value=value, unit=unit, **more)
        self.lines.append(line)
        print(f"  {line.name}: {line.value:.4g} {line.unit} {line.note}", flush=True)

    def table(self) -> str:
        head = ("measured", "value", "must", "aim", "", "note")
        rows = [
            (
                line.name,
                f"{line.value:.3f} {line.unit}",
                "" if line.must is None else f"{line.must:g}",
                "" if line.aim is None else f"{line.aim:g}",
                line.verdict,
                line.note,
            )
            for line in self.lines
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows))


@dataclass
class Bench:
    """The Llama-2-7B-shaped decoder and what its plans share, made when a part first needs it."""

    report: Report
    weights: Weights | None = None

    @functools.cached_property
    def decoder(self) -> Decoder:
        weights = self.weights or random_weights(SHAPES["llama-2-7b"], dtype=torch.bfloat16, device="cuda")
        return ready_decoder(weights)

    @functools.cached_property
    def down_rows(self) -> Tensor:
        return transpose_rows(self.decoder.weights.down)

    @functools.cached_property
    def inputs(self) -> InputRows:
        return input_rows(self.decoder.weights, self.down_rows)


def ready_decoder(weights: Weights, tuning: Tuning | None = None) -> Decoder:
    """A decoder with a random cache and forced random tokens, at `POSITION`."""
    decoder = decoder_of(weights, max_length=LENGTH, tuning=tuning)
    for warning in decoder.warnings:
        print("  WARNING", warning)
    decoder.state.keys.normal_()
    decoder.state.values.normal_()
    decoder.start(1, POSITION)
    decoder.force(torch.randint(0, weights.shape.vocab, (STEPS + 8,), device="cuda"))
    return decoder


def step_ms(decoder: Decoder, plan: Plan) -> float:
    """Milliseconds per token of `STEPS` tokens under `plan`."""
    decoder.set_plan(plan)
    decoder.start(1, POSITION)
    return elapsed_ms(lambda: decoder.decode(STEPS)) / STEPS


def compare(decoder: Decoder, plan: Plan, dense: DensePlan, pairs: int = 15) -> Paired:
    return paired(lambda: step_ms(decoder, dense), lambda: step_ms(decoder, plan), pairs=pairs)


def limit_ms(report: Report, shape: Shape, **shares: float) -> float:
    """The time that the bytes of a step take at the measured bandwidth."""
    return shape.step_bytes(position=POSITION + STEPS // 2, **shares) / report.bandwidth * 1e3


def add_pair(report: Report, name: str, result: Paired, limit: float, dense_limit: float, targets=(None, None)) -> None:
    report.add(
        f"{name}: speed-up over own dense",
        result.speedup,
        "x",
        must=targets[0],
        aim=targets[1],
        note=f"[{result.low:.3f}, {result.high:.3f}] {result.baseline_ms:.3f} -> {result.contender_ms:.3f} ms, "
        f"{100 * limit / result.contender_ms:.0f} % of its byte limit, ceiling {dense_limit / limit:.2f}x",
    )


def part_check(bench: Bench) -> None:
    import pytest

    folder = Path(__file__).resolve().parent.parent
    code = pytest.main([str(folder / "tests" / "gpu"), "-q", "-p", "no:cacheprovider", "--durations=5", "--tb=short"])
    bench.report.add("correctness tests passed", float(code == 0), "", must=1, aim=1, note=f"pytest exit code {code}")


def part_generate(bench: Bench) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES["llama-2-7b"]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(0, shape.vocab, (1, POSITION), device="cuda")

    def generate(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    generate(2)
    one = min(generate(1) for _ in range(2))
    many = min(generate(1 + GENERATED) for _ in range(2))
    bench.report.add("transformers eager generate", (many - one) / GENERATED, "ms", note=f"{GENERATED} tokens")
    bench.weights = weights_from_model(model, max_length=LENGTH)
    share_storage(model, bench.weights)


def part_dense(bench: Bench) -> None:
    report, decoder = bench.report, bench.decoder
    dense, shape = DensePlan(), decoder.weights.shape
    for _ in range(3):
        step_ms(decoder, dense)
    times = sorted(step_ms(decoder, dense) for _ in range(21))
    ms, limit = times[10], limit_ms(report, shape)
    report.add(
        "dense engine", ms, "ms", must=5.6, aim=4.9, note=f"10-90 %: {times[2]:.3f} to {times[18]:.3f}, {decoder.path}"
    )
    report.add(
        "dense engine: percent of byte limit", 100 * limit / ms, "%", must=80, aim=92, note=f"limit {limit:.3f} ms"
    )
    eager = [line.value for line in report.lines if line.name.startswith("transformers eager")]
    if eager:
        report.add("dense engine over eager generate", eager[0] / ms, "x")


def part_sliced(bench: Bench) -> None:
    report, decoder, shape = bench.report, bench.decoder, bench.decoder.weights.shape
    keep = shape.neurons // 2
    plan = sliced.empty_plan(decoder.weights, sliced.capacity_for(keep))
    scores = torch.rand(shape.layers, shape.neurons, device="cuda")

    def select_and_gather() -> None:
        sliced.select_top(plan.selection, scores, keep)
        sliced.fill(plan, decoder.weights, bench.down_rows, decoder.operators)

    report.add("selection and gathering, 50 %", median_ms(select_and_gather), "ms", must=5.0, aim=3.5)
    dense = DensePlan()
    shares = {"mlp": keep / shape.neurons}
    result = compare(decoder, plan, dense)
    add_pair(report, "sliced 50 %", result, limit_ms(report, shape, **shares), limit_ms(report, shape), (1.30, 1.40))
    indexed = IndexedPlan(down_rows=bench.down_rows, selection=plan.selection)
    result = compare(decoder, indexed, dense)
    add_pair(report, "index list 50 %", result, limit_ms(report, shape, **shares), limit_ms(report, shape))
    for one in (dense, plan, indexed):
        decoder.forget_plan(one)


def part_cats(bench: Bench) -> None:
    report, decoder, shape = bench.report, bench.decoder, bench.decoder.weights.shape
    for share, targets in ((0.5, (1.10, 1.20)), (0.7, (None, None)), (0.9, (None, None))):
        plan = NeuronPlan(threshold=torch.zeros(shape.layers, 1, device="cuda"), down_rows=bench.down_rows)
        decoder.start(1, POSITION)
        fit_neurons(decoder, plan, share)
        decoder.start(2, POSITION)
        realised = realised_neurons(decoder, plan)
        shares = {"mlp": 1 - realised * 2 / 3}
        dense = DensePlan()
        result = compare(decoder, plan, dense)
        add_pair(
            report,
            f"CATS {100 * share:.0f} % (realised {100 * realised:.1f})",
            result,
            limit_ms(report, shape, **shares),
            limit_ms(report, shape),
            targets,
        )
        decoder.forget_plan(plan)
        decoder.forget_plan(dense)


def part_teal(bench: Bench) -> None:
    report, decoder, shape = bench.report, bench.decoder, bench.decoder.weights.shape
    targets = {0.25: (1.08, 1.16), 0.5: (1.38, 1.55), 0.7: (1.75, 2.1), 0.9: (None, None)}
    for share, atomics in ((0.25, False), (0.5, False), (0.7, False), (0.9, False), (0.5, True)):
        plan = InputPlan(
            weights=bench.inputs,
            threshold=torch.zeros(shape.layers, 7, device="cuda"),
            fast_atomics=atomics,
        )
        decoder.start(1, POSITION)
        fit_inputs(decoder, plan, share)
        decoder.start(2, POSITION)
        realised = realised_inputs(decoder, plan)
        shares = {"mlp": 1 - realised, "attention": 1 - realised}
        dense = DensePlan()
        result = compare(decoder, plan, dense)
        add_pair(
            report,
            f"TEAL {100 * share:.0f} % (realised {100 * realised:.1f}){' atomics' if atomics else ''}",
            result,
            limit_ms(report, shape, **shares),
            limit_ms(report, shape),
            (None, None) if atomics else targets[share],
        )
        decoder.forget_plan(plan)
        decoder.forget_plan(dense)


def rotated(inputs: int, outputs: int) -> tuple[list[Tensor], Tensor]:
    """Enough weights [inputs, outputs] that no cache holds a tenth of them, and an x for each."""
    copies = -(-1_300_000_000 // (inputs * outputs * 2))
    return [torch.randn(inputs, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)], torch.randn(
        copies, inputs, device="cuda"
    )


def per_call_us(
    call: Callable[[Tensor, Tensor], None], weights: list[Tensor], xs: Tensor, operators: Operators | None = None
) -> float:
    """Microseconds of one product, all of them captured in one graph, chained where they are `operators`' own."""

    def work() -> None:
        with operators.chain() if operators else contextlib.nullcontext():
            for weight, x in zip(weights, xs, strict=True):
                call(weight, x)

    return median_ms(replay_of(work), repeats=9) / len(weights) * 1e3


def part_gemv(bench: Bench) -> None:
    for inputs, outputs in GEMV_SHAPES:
        _gemv_of(bench.report, inputs, outputs)
        torch.cuda.empty_cache()


def _gemv_of(report: Report, inputs: int, outputs: int) -> None:
    from gpu_masked_splitk import best_of, masked_splitk

    operators = Operators(torch.device("cuda"))
    weights, xs = rotated(inputs, outputs)
    out = torch.zeros(outputs, device="cuda")
    cublas = per_call_us(lambda weight, x: torch.mv(weight.T, x), weights, xs.bfloat16())
    for share in (0.25, 0.5, 0.7, 0.9):
        threshold = xs.abs().flatten()[:1_000_000].quantile(share).reshape(1)
        level = threshold.item()

        def ours(epilogue: Epilogue, threshold: Tensor = threshold) -> float:
            return per_call_us(
                lambda weight, x: operators.columns(out, x, weight, threshold=threshold, epilogue=epilogue),
                weights,
                xs,
                operators,
            )

        def baseline(configuration: tuple, level: float = level) -> float:
            return per_call_us(lambda weight, x: masked_splitk(weight, x, level, out, configuration), weights, xs)

        _, published = best_of(baseline)
        exact, atomic = ours(Epilogue.WRITE), ours(Epilogue.ATOMIC_ADD)
        limit = inputs * outputs * 2 * (1 - share) / report.bandwidth * 1e6
        must, aim = GEMV_TARGETS.get(share, (None, None))
        report.add(
            f"GEMV {inputs} -> {outputs} at {share:g} over masked_splitk",
            published / exact,
            "x",
            must=must,
            aim=aim,
            note=f"{published:.1f} -> {exact:.1f} us; atomics {atomic:.1f}, limit {limit:.1f}, cuBLAS {cublas:.1f}",
        )


def part_shapes(bench: Bench) -> None:
    release(bench)
    for name in ("llama-3-8b", "mistral-7b", "qwen2.5-0.5b", "smollm2-135m"):
        shape = SHAPES[name]
        decoder = ready_decoder(random_weights(shape, dtype=torch.bfloat16, device="cuda"))
        down_rows = transpose_rows(decoder.weights.down)
        limit, dense = limit_ms(bench.report, shape), DensePlan()
        slices = sliced.empty_plan(decoder.weights, sliced.capacity_for(shape.neurons // 2))
        sliced.select_top(slices.selection, torch.rand(shape.layers, shape.neurons, device="cuda"), shape.neurons // 2)
        sliced.fill(slices, decoder.weights, down_rows, decoder.operators)
        result = compare(decoder, slices, dense, pairs=9)
        bench.report.add(
            f"{name}: dense",
            result.baseline_ms,
            "ms",
            note=f"{100 * limit / result.baseline_ms:.0f} % of the byte limit {limit:.3f}",
        )
        add_pair(bench.report, f"{name}: sliced 50 %", result, limit_ms(bench.report, shape, mlp=0.5), limit)
        cats = NeuronPlan(threshold=torch.zeros(shape.layers, 1, device="cuda"), down_rows=down_rows)
        teal = InputPlan(
            weights=input_rows(decoder.weights, down_rows), threshold=torch.zeros(shape.layers, 7, device="cuda")
        )
        for plan, fit, label, shares in (
            (cats, fit_neurons, "CATS 50 %", {"mlp": 2 / 3}),
            (teal, fit_inputs, "TEAL 50 %", {"mlp": 0.5, "attention": 0.5}),
        ):
            decoder.start(1, POSITION)
            fit(decoder, plan, 0.5)
            result = compare(decoder, plan, dense, pairs=9)
            add_pair(bench.report, f"{name}: {label}", result, limit_ms(bench.report, shape, **shares), limit)
        del decoder, down_rows, slices, cats, teal
        gc.collect()
        torch.cuda.empty_cache()


def part_profile(bench: Bench) -> None:
    """Where a dense step's time goes: each stage of all layers captured alone, beside its bytes' time."""
    decoder, report = bench.decoder, bench.report
    weights, state, operators = decoder.weights, decoder.state, decoder.operators
    shape, step = weights.shape, NativeStep(decoder.weights, decoder.state, DensePlan(), decoder.operators)
    layers, norm = range(shape.layers), Norm(weights.final_norm, shape.norm_epsilon)
    decoder.start(1, POSITION)
    stages = {
        "qkv": (
            lambda i: operators.project(state.qkv, state.hidden, weights.qkv[i], norm=norm),
            shape.width * shape.qkv_width * 2,
        ),
        "attention": (
            lambda i: operators.attend(
                state.mix, state.qkv, state.keys[i], state.values[i], position=state.position, angles=state.angles
            ),
            4 * shape.kv_width * POSITION,
        ),
        "out": (
            lambda i: operators.add(state.hidden, state.mix, weights.out[i]),
            shape.width * shape.query_width * 2,
        ),
        "gate and up": (
            lambda i: operators.gated(
                state.neurons, state.hidden, weights.gate_up[i], norm=norm, activation=shape.activation
            ),
            shape.mlp_weights * 4 // 3,
        ),
        "down": (
            lambda i: operators.add(state.hidden, state.neurons, weights.down[i]),
            shape.mlp_weights * 2 // 3,
        ),
        "layer": (lambda i: (step.attention(i), step.mlp(i)), 2 * (shape.attention_weights + shape.mlp_weights)),
    }
    for name, (stage, size) in stages.items():

        def work(stage: Callable[[int], object] = stage) -> None:
            with operators.chain():
                for layer in layers:
                    stage(layer)

        replay = replay_of(work)
        us = median_ms(replay) / len(layers) * 1e3
        limit = size / report.bandwidth * 1e6
        report.add(f"profile: {name}, one layer", us, "us", note=f"bytes {limit:.1f} us, {100 * limit / us:.0f} %")
    us = median_ms(replay_of(step.next_token)) * 1e3
    limit = shape.vocab * shape.width * 2 / report.bandwidth * 1e6
    report.add("profile: head and next token", us, "us", note=f"bytes {limit:.1f} us, {100 * limit / us:.0f} %")


def part_compiled(bench: Bench) -> None:
    """The fallback: the torch step compiled per layer and captured, without the compiled CUDA kernels."""
    begin = time.perf_counter()
    decoder = decoder_of(bench.decoder.weights, max_length=LENGTH, native=False)
    for warning in decoder.warnings:
        print("  WARNING", warning)
    decoder.start(1, POSITION)
    compile_s = time.perf_counter() - begin
    plan = DensePlan()
    decoder.set_plan(plan)
    times = sorted(step_ms(decoder, plan) for _ in range(7))
    bench.report.add(
        "dense fallback (torch.compile)", times[3], "ms", note=f"compiled and captured in {compile_s:.0f} s"
    )


def part_tune(bench: Bench) -> None:
    """Launch shapes against each other; the best become the defaults of `Tuning`."""
    weights = bench.decoder.weights
    for threads, blocks in itertools.product((256, 384, 512), (1, 2)):
        tuning = Tuning(rows_threads=threads, rows_blocks_per_sm=blocks)
        decoder = ready_decoder(weights, tuning)
        plan = DensePlan()
        ms = sorted(step_ms(decoder, plan) for _ in range(5))[2]
        bench.report.add(f"tune: dense, {threads} threads, {blocks} blocks per multiprocessor", ms, "ms")
        del decoder
    for inputs, outputs in ((4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096)):
        _tune_columns(bench.report, inputs, outputs)
        torch.cuda.empty_cache()


def _tune_columns(report: Report, inputs: int, outputs: int) -> None:
    weights, xs = rotated(inputs, outputs)
    out = torch.zeros(outputs, device="cuda")
    shares = (0.0, 0.5, 0.9)
    levels = [xs.abs().flatten()[:1_000_000].quantile(share).reshape(1) if share else None for share in shares]
    done = set()
    for blocks, slices in itertools.product((1, 2, 3, 4, 5), (8, 16)):
        operators = Operators(torch.device("cuda"), Tuning(columns_blocks_per_sm=blocks, max_slices=slices))
        split = operators.slices((outputs,), inputs)
        if split in done:
            continue
        done.add(split)

        def product(weight: Tensor, x: Tensor, level: Tensor | None, operators: Operators = operators) -> None:
            operators.columns(out, x, weight, threshold=level)

        found = [per_call_us(functools.partial(product, level=level), weights, xs, operators) for level in levels]
        report.add(
            f"tune: {inputs} -> {outputs} in {split} slices at .5",
            found[1],
            "us",
            note=f"all {found[0]:.1f}, .9 {found[2]:.1f}",
        )


def release(bench: Bench) -> None:
    for name in ("decoder", "down_rows", "inputs"):
        bench.__dict__.pop(name, None)
    bench.weights = None
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=DEFAULT_PARTS, help=f"comma-separated, of {', '.join(PARTS)}")
    asked = parser.parse_args().parts.split(",")
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device("cuda")
    report = Report()
    bench = Bench(report=report)
    torch.manual_seed(0)
    with torch.no_grad():
        report.bandwidth = read_bandwidth(device)
        torch.cuda.empty_cache()
        report.add("read bandwidth", report.bandwidth / 1e12, "TB/s")
        for part in asked:
            begin = time.perf_counter()
            print(f"== {part}", flush=True)
            try:
                globals()[f"part_{part}"](bench)
            except Exception:
                traceback.print_exc()
                sys.stderr.flush()
                report.failures.append(part)
                gc.collect()
                torch.cuda.empty_cache()
            print(f"== {part} took {time.perf_counter() - begin:.0f} s", flush=True)
    properties = torch.cuda.get_device_properties(device)
    where = f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"\n{where}\n{report.table()}")
    if report.failures:
        print("parts that failed:", ", ".join(report.failures))
    if os.environ.get("OUT"):
        content = {"device": where, "failures": report.failures, "lines": [asdict(line) for line in report.lines]}
        (Path(os.environ["OUT"]) / "gpu_decode.json").write_text(json.dumps(content, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
