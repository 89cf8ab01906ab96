"""Batches: dense, unions and turns at 1, 2, 4 and 8 sequences, whose masks are as unlike as random tokens make them."""

import dataclasses
from collections.abc import Callable

import torch
from gpu_bench import LENGTH, POSITION, STEPS, Bench, limit_ms, ready_decoder, step_ms
from gpu_calibrate import fit_inputs, fit_neurons, operators_of
from gpu_timing import elapsed_ms, median_ms, paired

from actsparse.engine.cuda.engine import CudaEngine, decoder_of
from actsparse.engine.cuda.graph import capture
from actsparse.engine.cuda.in_turns import InTurns
from actsparse.engine.cuda.launcher import Tuning
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step import sliced
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, InputPlan, NeuronPlan

SIZES = (1, 2, 4, 8)
OUTPUTS = {"q": 1, "k": 1, "v": 1, "o": 1, "gate": 2.6875, "up": 2.6875, "down": 1, "neuron": 1}  # in widths
TUNINGS = [(4, 1), (8, 1)]  # stages of a ring, blocks a multiprocessor


def part_batches(bench: Bench) -> None:
    """A table by batch: dense, then each plan by its union (with the share of rows it reads) and in turns."""
    weights, report = bench.decoder.weights, bench.report
    inputs, down_rows, shape = bench.inputs, bench.down_rows, bench.decoder.weights.shape
    for batch in SIZES:
        decoder, dense = ready_decoder(weights, batch=batch), DensePlan()
        for _ in range(3):
            step_ms(decoder, dense)
        ms, limit = sorted(step_ms(decoder, dense) for _ in range(7))[3], limit_ms(report, shape)
        report.add(f"batch {batch}: dense", ms, "ms", note=f"{100 * limit / ms:.0f} % of one sequence's byte limit")
        for name, share in (("TEAL", 0.25), ("TEAL", 0.5), ("TEAL", 0.7), ("TEAL", 0.9), ("CATS", 0.5), ("CATS", 0.9)):
            decoder.start(1, POSITION)
            if name == "TEAL":
                plan = InputPlan(weights=inputs, threshold=torch.zeros(shape.layers, 7, device="cuda"))
                fit_inputs(decoder, plan, share)
            else:
                plan = NeuronPlan(threshold=torch.zeros(shape.layers, 1, device="cuda"), down_rows=down_rows)
                fit_neurons(decoder, plan, share)
            _plan(bench, f"batch {batch}: {name} {100 * share:.0f} %", decoder, plan, dense)
            decoder.forget_plan(plan)
        _lists(bench, decoder, dense)
        del decoder
        torch.cuda.empty_cache()


def _plan(bench: Bench, name: str, decoder: Decoder, plan: InputPlan | NeuronPlan, dense: DensePlan) -> None:
    found = paired(lambda: step_ms(decoder, dense), lambda: step_ms(decoder, plan), pairs=7)
    turns = f"; in turns {_in_turns(decoder, plan):.3f} ms" if 1 < decoder.state.batch <= 4 else ""
    bench.report.add(
        f"{name}: speed-up over own dense",
        found.speedup,
        "x",
        note=f"[{found.low:.3f}, {found.high:.3f}] {found.baseline_ms:.3f} -> {found.contender_ms:.3f} ms, reads "
        f"{100 * _read(decoder, plan):.0f} % of the rows{turns}",
    )


def _lists(bench: Bench, decoder: Decoder, dense: DensePlan) -> None:
    """Copies of the neurons that any sequence keeps, half of them each, chosen apart; and one half for all."""
    weights, batch = decoder.weights, decoder.state.batch
    shape = weights.shape
    for name, own in (("lists 50 %, each its own", batch), ("lists 50 %, one for all", 1)):
        masks = torch.rand(shape.layers, own, shape.neurons, device="cuda") < 0.5
        union = masks.any(dim=1)
        plan = sliced.empty_plan(weights, sliced.capacity_for(int(union.sum(dim=1).max())))
        sliced.list_kept(plan.selection, union)
        sliced.fill(plan, weights, bench.down_rows, operators_of(decoder))
        places = plan.selection.index.long()[:, None].expand(-1, batch, -1)
        live = torch.arange(places.shape[2], device="cuda") < plan.selection.count[:, None]
        if batch > 1:
            mask = masks.expand(-1, batch, -1).gather(2, places) & live[:, None]
            plan = dataclasses.replace(plan, mask=mask.float())
        found = paired(lambda p=plan: step_ms(decoder, dense), lambda p=plan: step_ms(decoder, p), pairs=7)
        bench.report.add(
            f"batch {batch}: {name}: speed-up over own dense",
            found.speedup,
            "x",
            note=f"[{found.low:.3f}, {found.high:.3f}] {found.baseline_ms:.3f} -> {found.contender_ms:.3f} ms, reads "
            f"{100 * union.float().mean().item():.0f} % of the neurons",
        )
        decoder.forget_plan(plan)


def _read(decoder: Decoder, plan: InputPlan | NeuronPlan) -> float:
    """The share of weights behind the rule that a step read."""
    engine = decoder.engine
    assert isinstance(engine, CudaEngine)
    counters = engine.counters[id(plan)]
    for one in counters:
        one.read.zero_()
    step_ms(decoder, plan)
    read = sum(one.read.item() * OUTPUTS[one.unit] for one in counters)
    return read / (STEPS * sum(one.total * OUTPUTS[one.unit] for one in counters))


def _in_turns(decoder: Decoder, plan: InputPlan | NeuronPlan) -> float:
    """Milliseconds of a step that decodes one sequence after the other."""
    weights = decoder.weights
    operators = Operators(weights.device)
    captured = capture(InTurns(decoder.state, lambda one: native_step(weights, one, plan, operators), operators.blocks))

    def lap() -> float:
        decoder.start(1, POSITION)
        return elapsed_ms(lambda: [captured.run() for _ in range(STEPS)]) / STEPS

    lap()
    return sorted(lap() for _ in range(3))[1]


def part_batch_tuning(bench: Bench) -> None:
    """Dense batches under other launch shapes of their row products."""
    weights = bench.decoder.weights
    for batch in SIZES[1:]:
        for depth, blocks in TUNINGS:
            tuning = Tuning(batch_depth=depth, batch_blocks_per_sm=blocks)
            decoder, dense = ready_decoder(weights, tuning, batch=batch), DensePlan()
            step_ms(decoder, dense)
            ms = sorted(step_ms(decoder, dense) for _ in range(5))[2]
            bench.report.add(f"batch {batch}: dense, {depth} stages, {blocks} blocks", ms, "ms")


def part_batch_columns(bench: Bench) -> None:
    """Unions under other launch shapes of their products."""
    weights = bench.decoder.weights
    for batch, first, kib in ((4, 3, 112), (4, 5, 112), (8, 5, 226), (8, 5, 112), (8, 5, 96)):
        tuning = Tuning(tensor_columns_from=first, batch_columns_shared=kib * 1024)
        decoder = ready_decoder(weights, tuning, batch=batch)
        for share in (0.5, 0.7, 0.9):
            plan = InputPlan(weights=bench.inputs, threshold=torch.zeros(weights.shape.layers, 7, device="cuda"))
            decoder.start(1, POSITION)
            fit_inputs(decoder, plan, share)
            ms = sorted(step_ms(decoder, plan) for _ in range(5))[2]
            how = f"tensor cores from {first}, {kib} KiB a block"
            bench.report.add(f"batch {batch}: TEAL {100 * share:.0f} %, {how}", ms, "ms")
            decoder.forget_plan(plan)


def part_batch_profile(bench: Bench) -> None:
    """Where the time of a dense step of a batch goes: each kernel of all layers captured alone, us a layer."""
    weights = bench.decoder.weights
    for batch in SIZES[1:]:
        decoder = ready_decoder(weights, batch=batch)
        engine = decoder.engine
        assert isinstance(engine, CudaEngine)
        assert engine.operators is not None
        operators = engine.operators
        step = native_step(weights, decoder.state, DensePlan(), operators)
        decoder.start(1, POSITION)
        step()
        for stage, run in (step.attention_stages | step.mlp_stages).items():
            us = _per_layer(operators, run, weights.shape.layers)
            bench.report.add(f"profile batch {batch}: {stage}", us, "us")


def _per_layer(operators: Operators, run: Callable[[int], None], layers: int) -> float:
    def work() -> None:
        with operators.chain():
            for layer in range(layers):
                run(layer)

    captured = capture(work)
    return median_ms(captured.run) / layers * 1e3


def part_fallback_batches(bench: Bench) -> None:
    """Dense batches without the compiled kernels: torch.compile."""
    for batch in (2, 4):
        decoder = decoder_of(bench.decoder.weights, max_length=LENGTH, batch=batch, native=False)
        plan = DensePlan()
        decoder.start(1, POSITION)
        for _ in range(2):
            step_ms(decoder, plan)
        ms = sorted(step_ms(decoder, plan) for _ in range(5))[2]
        bench.report.add(f"batch {batch}: dense by torch.compile", ms, "ms")
