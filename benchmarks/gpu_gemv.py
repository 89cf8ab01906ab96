"""The input-sparse product alone, beside the published design."""

import contextlib
from collections.abc import Callable

import torch
from gpu_bench import Bench
from gpu_report import Report
from gpu_timing import median_ms, replay_of
from torch import Tensor

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.operators import Operators

GEMV_SHAPES = ((4096, 11008), (11008, 4096), (4096, 4096), (4096, 14336))
GEMV_TARGETS = {0.5: (1.0, 1.1), 0.7: (1.2, 1.3), 0.9: (1.6, 2.2)}


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
