"""Where a step's time goes: each kernel of all layers captured alone, beside the time of the bytes that it needs.

A sparse kernel is timed once more with thresholds that nothing reaches: what it costs without any weights.
"""

from collections.abc import Callable

import torch
from gpu_bench import POSITION, Bench
from gpu_calibrate import fit_inputs, fit_neurons, operators_of
from gpu_timing import median_ms, replay_of

from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.cuda.native_step import NativeStep
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step.plans import DensePlan, InputPlan, NeuronPlan, Plan
from actsparse.engine.step.shape import Shape

SHARE = 0.5


def stage_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of weights and cache that a dense stage of one layer reads."""
    mlp = shape.mlp_weights * 2
    return {
        "qkv": shape.width * shape.qkv_width * 2,
        "attention": 4 * shape.kv_width * POSITION,
        "out": shape.width * shape.query_width * 2,
        "gate and up": mlp * 2 // 3,
        "first half": mlp // 3,
        "second half": mlp // 3,
        "down": mlp // 3,
    }


def part_profile(bench: Bench) -> None:
    """Dense, TEAL and CATS at 50 %, kernel by kernel."""
    decoder, shape = bench.decoder, bench.decoder.weights.shape
    operators = operators_of(decoder)
    teal = InputPlan(weights=bench.inputs, threshold=torch.zeros(shape.layers, 7, device="cuda"))
    cats = NeuronPlan(threshold=torch.zeros(shape.layers, 1, device="cuda"), down_rows=bench.down_rows)
    decoder.start(1, POSITION)
    fit_inputs(decoder, teal, SHARE)
    decoder.start(1, POSITION)
    fit_neurons(decoder, cats, SHARE)
    always = {"qkv", "attention", "out", "gate and up", "first half", "down"}
    cases: tuple[tuple[str, Plan, set[str]], ...] = (
        ("dense", DensePlan(), always),
        ("TEAL .5", teal, {"attention"}),
        ("CATS .5", cats, {"qkv", "attention", "out", "first half"}),
    )
    for name, plan, whole in cases:
        _stages(bench, name, plan, operators, whole)
        _layer(bench, name, plan, operators)
    empty = InputPlan(weights=bench.inputs, threshold=torch.full((shape.layers, 7), torch.inf, device="cuda"))
    _stages(bench, "TEAL, nothing kept", empty, operators, None)
    _end(bench, operators)


def _stages(bench: Bench, name: str, plan: Plan, operators: Operators, whole: set[str] | None) -> None:
    """Every kernel alone; those in `whole` read all bytes, others half of them, and none of them for None."""
    decoder, report = bench.decoder, bench.report
    step = native_step(decoder.weights, decoder.state, plan, operators)
    sizes = stage_bytes(decoder.weights.shape)
    for stage, run in (step.attention_stages | step.mlp_stages).items():
        us = _per_layer_us(bench, operators, step, run)
        share = 0.0 if whole is None else 1.0 if stage in whole else 1 - SHARE
        limit = sizes[stage] * (1.0 if stage == "attention" else share) / report.bandwidth * 1e6
        report.add(f"profile {name}: {stage}", us, "us", note=f"bytes {limit:.1f} us")


def _layer(bench: Bench, name: str, plan: Plan, operators: Operators) -> None:
    step = native_step(bench.decoder.weights, bench.decoder.state, plan, operators)

    def layer(index: int) -> None:
        step.attention(index)
        step.mlp(index)

    bench.report.add(f"profile {name}: a layer", _per_layer_us(bench, operators, step, layer), "us")


def _per_layer_us(bench: Bench, operators: Operators, step: NativeStep, run: Callable[[int], object]) -> float:
    layers = range(bench.decoder.weights.shape.layers)
    bench.decoder.start(1, POSITION)
    step()  # leaves activations of a whole step for the stage to read
    bench.decoder.start(1, POSITION)

    def work() -> None:
        with operators.chain():
            for layer in layers:
                run(layer)

    return median_ms(replay_of(work)) / len(layers) * 1e3


def _end(bench: Bench, operators: Operators) -> None:
    """The head and the next token, dense."""
    decoder, shape = bench.decoder, bench.decoder.weights.shape
    step = native_step(decoder.weights, decoder.state, DensePlan(), operators)
    decoder.start(1, POSITION)

    def end() -> None:
        with operators.chain():
            step.logits()
            step.token()

    us = median_ms(replay_of(end), repeats=5) * 1e3
    limit = shape.vocab * shape.width * 2 / bench.report.bandwidth * 1e6
    bench.report.add("profile: head and next token", us, "us", note=f"bytes {limit:.1f} us")
