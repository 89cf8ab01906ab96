"""Launch shapes against each other on whole steps; the best become the defaults of `Tuning`."""

import itertools
import statistics

import torch
from gpu_bench import POSITION, Bench, ready_decoder, step_ms
from gpu_calibrate import fit_inputs

from actsparse.engine.cuda.operators import Tuning
from actsparse.engine.step.plans import DensePlan, InputPlan, Plan

DENSE = ((512, 2, False), (512, 2, True), (512, 1, True))
BLOCKS = (1, 2, 3)
AHEAD = (0, 2, 4, 8)
SHARES = (0.25, 0.5, 0.7)


def part_tune(bench: Bench) -> None:
    report, weights = bench.report, bench.decoder.weights
    for threads, blocks, deep in DENSE:
        tuning = Tuning(rows_threads=threads, rows_blocks_per_sm=blocks, rows_deep=deep)
        ms = tuned_ms(bench, tuning, DensePlan())
        report.add(f"tune: dense, {threads} threads, {blocks} blocks, {'long' if deep else 'short'} rings", ms, "ms")
    plans = {}
    for share in SHARES:
        plan = InputPlan(weights=bench.inputs, threshold=torch.zeros(weights.shape.layers, 7, device=weights.device))
        bench.decoder.start(1, POSITION)
        fit_inputs(bench.decoder, plan, share)
        plans[share] = plan
    for blocks, ahead in itertools.product(BLOCKS, AHEAD):
        found = [tuned_ms(bench, Tuning(columns_blocks_per_sm=blocks, ahead=ahead), plan) for plan in plans.values()]
        report.add(
            f"tune: TEAL {SHARES}, {blocks} blocks, {ahead} rows ahead",
            found[1],
            "ms",
            note=" ".join(f"{ms:.3f}" for ms in found),
        )


def tuned_ms(bench: Bench, tuning: Tuning, plan: Plan) -> float:
    decoder = ready_decoder(bench.decoder.weights, tuning)
    return statistics.median(step_ms(decoder, plan) for _ in range(4))
