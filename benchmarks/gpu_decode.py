"""Decode speed on one GPU against the byte limit measured in the same run, correctness first.

    python benchmarks/gpu_decode.py --parts check,generate,dense,sliced,cats,teal,gemv,shapes

Random weights of the Llama-2-7B shape, batch 1, bfloat16, a cache of 1024 with 512 live positions, CUDA-graph replay,
teacher-forced tokens, dense and sparse in turn. Prints one table; with $OUT set, writes it as JSON there too.
`choices` and the parts of batches are asked for by name.
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_batches import part_batch_columns, part_batch_profile, part_batch_tuning, part_batches, part_fallback_batches
from gpu_bench import LENGTH, POSITION, Bench, add_pair, compare, limit_ms, ready_decoder, release, step_ms
from gpu_calibrate import fit_inputs, fit_neurons, operators_of, realised_inputs, realised_neurons
from gpu_choices import part_choices
from gpu_gemv import part_gemv
from gpu_profile import part_profile
from gpu_report import Report
from gpu_timing import median_ms
from gpu_tune import part_tune

from actsparse.engine.cuda.bandwidth import read_bandwidth
from actsparse.engine.cuda.engine import decoder_of
from actsparse.engine.step import sliced
from actsparse.engine.step.packing import share_storage, weights_from_model
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan
from actsparse.engine.step.shape import SHAPES
from actsparse.engine.step.weights import input_rows, random_weights, transpose_rows

GENERATED = 16
TEST_OPTIONS = ("-n", "6") if importlib.util.find_spec("xdist") else ()
ROOT = Path(__file__).resolve().parent.parent


def part_check(bench: Bench) -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short", *TEST_OPTIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    note = f"pytest exit code {done.returncode}: {(done.stdout.strip().splitlines() or [''])[-1]}"
    bench.report.add("correctness tests passed", float(done.returncode == 0), "", must=1, aim=1, note=note)


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
    bench.weights = weights_from_model(model)
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
        sliced.fill(plan, decoder.weights, bench.down_rows, operators_of(decoder))

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


def part_shapes(bench: Bench) -> None:
    release(bench)
    for name in ("llama-3-8b", "mistral-7b", "qwen2.5-0.5b", "smollm2-135m"):
        shape = SHAPES[name]
        decoder = ready_decoder(random_weights(shape, dtype=torch.bfloat16, device="cuda"))
        down_rows = transpose_rows(decoder.weights.down)
        limit, dense = limit_ms(bench.report, shape), DensePlan()
        slices = sliced.empty_plan(decoder.weights, sliced.capacity_for(shape.neurons // 2))
        sliced.select_top(slices.selection, torch.rand(shape.layers, shape.neurons, device="cuda"), shape.neurons // 2)
        sliced.fill(slices, decoder.weights, down_rows, operators_of(decoder))
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


PARTS: dict[str, Callable[[Bench], None]] = {
    "check": part_check,
    "generate": part_generate,
    "dense": part_dense,
    "sliced": part_sliced,
    "cats": part_cats,
    "teal": part_teal,
    "gemv": part_gemv,
    "shapes": part_shapes,
    "profile": part_profile,
    "compiled": part_compiled,
    "tune": part_tune,
    "choices": part_choices,
    "batches": part_batches,
    "batch-tuning": part_batch_tuning,
    "batch-columns": part_batch_columns,
    "batch-profile": part_batch_profile,
    "batch-fallback": part_fallback_batches,
}
DEFAULT_PARTS = "check,generate,dense,sliced,cats,teal,gemv,shapes,profile"


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
                PARTS[part](bench)
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
