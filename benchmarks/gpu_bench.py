"""What the parts of the decode benchmark share: the decoder, its plans' weights, and one way to time a step."""

import functools
import gc
from dataclasses import dataclass

import torch
from gpu_report import Report
from gpu_timing import Paired, elapsed_ms, paired
from torch import Tensor

from actsparse.engine.cuda.engine import decoder_of
from actsparse.engine.cuda.launcher import Tuning
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, Plan
from actsparse.engine.step.shape import SHAPES, Shape
from actsparse.engine.step.weights import InputRows, Weights, input_rows, random_weights, transpose_rows

LENGTH, POSITION, STEPS = 1024, 512, 24


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


def ready_decoder(weights: Weights, tuning: Tuning | None = None, *, batch: int = 1) -> Decoder:
    """A decoder with a random cache and forced random tokens, at `POSITION`."""
    decoder = decoder_of(weights, max_length=LENGTH, batch=batch, tuning=tuning)
    for warning in decoder.warnings:
        print("  WARNING", warning)
    decoder.state.keys.normal_()
    decoder.state.values.normal_()
    decoder.start(1, POSITION)
    decoder.force(torch.randint(0, weights.shape.vocab, (batch, STEPS + 8), device="cuda"))
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


def release(bench: Bench) -> None:
    for name in ("decoder", "down_rows", "inputs"):
        bench.__dict__.pop(name, None)
    bench.weights = None
    gc.collect()
    torch.cuda.empty_cache()
