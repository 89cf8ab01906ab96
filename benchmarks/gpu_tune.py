"""Launch shapes against each other on whole steps; the best become the defaults of `Tuning`."""

import statistics

import torch
from gpu_bench import POSITION, Bench, ready_decoder, step_ms
from gpu_calibrate import fit_inputs, fit_neurons

from actsparse.engine.cuda.launcher import Tuning
from actsparse.engine.step.plans import InputPlan, NeuronPlan, Plan

AHEAD = (0, 1, 2)
SHARES = (0.25, 0.5, 0.7)


def part_tune(bench: Bench) -> None:
    report, weights = bench.report, bench.decoder.weights
    plans: list[Plan] = []
    for share in SHARES:
        teal = InputPlan(weights=bench.inputs, threshold=torch.zeros(weights.shape.layers, 7, device=weights.device))
        bench.decoder.start(1, POSITION)
        fit_inputs(bench.decoder, teal, share)
        plans.append(teal)
    cats = NeuronPlan(threshold=torch.zeros(weights.shape.layers, 1, device=weights.device), down_rows=bench.down_rows)
    bench.decoder.start(1, POSITION)
    fit_neurons(bench.decoder, cats, 0.5)
    plans.append(cats)
    tunings = {f"{n} rows ahead": Tuning(ahead=n) for n in AHEAD}
    for name, tuning in tunings.items():
        found = [tuned_ms(bench, tuning, plan) for plan in plans]
        report.add(
            f"tune: {name}", found[1], "ms", note="TEAL .25 .5 .7, CATS .5: " + " ".join(f"{ms:.3f}" for ms in found)
        )


def tuned_ms(bench: Bench, tuning: Tuning, plan: Plan) -> float:
    decoder = ready_decoder(bench.decoder.weights, tuning)
    return statistics.median(step_ms(decoder, plan) for _ in range(4))
