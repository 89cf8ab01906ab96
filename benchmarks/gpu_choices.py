"""Plans that choose by number or by a router, against dense: half of what they choose from is kept, at random."""

from typing import Any

import torch
from gpu_bench import Bench, compare
from torch import Tensor

from actsparse.engine.step.plans import DensePlan, InputPlan, InputScores, column_norms
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.weights import InputRows, Weights
from actsparse.engine.step.work import Chosen, GatePlan, Groups, LayerWork, Routed, Scored
from actsparse.results import SiteKind

RANK, EXPERTS = 128, 64


def choices(weights: Weights, inputs: InputRows) -> dict[str, Any]:
    """A plan of each kind over `weights`; `inputs`: their products stored one row an input."""
    shape, device = weights.shape, weights.device
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=exact)

    tops = (tuple(width // 2 for width in _inputs_of(shape)),) * shape.layers
    norms = InputScores(
        qkv=column_norms(weights.qkv, shape.qkv_widths),
        out=column_norms(weights.out, (shape.width,)),
        gate_up=column_norms(weights.gate_up, (shape.neurons, shape.neurons)),
        down=column_norms(weights.down, (shape.width,)),
    )
    members = torch.arange(shape.neurons, dtype=torch.int32, device=device).view(EXPERTS, -1)
    queries = torch.arange(shape.query_width, dtype=torch.int32, device=device).view(shape.kv_heads, -1)
    half, site = shape.neurons // 2, SiteKind.MLP_IN

    def router() -> Chosen:
        return Chosen(first=draw(RANK, shape.width), second=draw(shape.neurons, RANK), top=half, site=site)

    def experts() -> Chosen:
        return Chosen(second=draw(EXPERTS, shape.width), top=EXPERTS // 2, site=site, members=members)

    def groups(layer: int) -> Groups:
        router = Chosen(second=draw(shape.kv_heads, shape.width), top=shape.kv_heads // 2, site=SiteKind.ATTN_IN)
        return Groups(router=router, out_rows=inputs.out[layer], query_rows=queries)

    layers, down = range(shape.layers), inputs.down
    return {
        "the largest half of the inputs": InputPlan(
            weights=inputs, threshold=torch.zeros(shape.layers, 7, device=device, dtype=exact), tops=tops
        ),
        "the largest half of the inputs, with scores": InputPlan(
            weights=inputs, threshold=torch.zeros(shape.layers, 7, device=device, dtype=exact), tops=tops, scores=norms
        ),
        "the largest half of the neurons": _plan(LayerWork(mlp=Scored(down_rows=down[i], top=half)) for i in layers),
        f"a router of rank {RANK}": _plan(
            LayerWork(mlp=Routed(router=router(), down_rows=down[layer])) for layer in layers
        ),
        f"half of {EXPERTS} experts": _plan(
            LayerWork(mlp=Routed(router=experts(), down_rows=down[layer])) for layer in layers
        ),
        "half of the KV groups": _plan(LayerWork(heads=groups(layer)) for layer in layers),
    }


def part_choices(bench: Bench) -> None:
    """Each plan's step over the dense step, one sequence."""
    dense = DensePlan()
    for name, plan in choices(bench.decoder.weights, bench.inputs).items():
        found = compare(bench.decoder, plan, dense, pairs=7)
        bench.report.add(
            f"choices: {name}: speed-up over own dense",
            found.speedup,
            "x",
            note=f"[{found.low:.3f}, {found.high:.3f}] {found.baseline_ms:.3f} -> {found.contender_ms:.3f} ms",
        )
        bench.decoder.forget_plan(plan)
    for warning in bench.decoder.warnings:
        print("  WARNING", warning)


def _inputs_of(shape: Shape) -> tuple[int, ...]:
    """How many inputs each projection has, as in `PROJECTIONS`."""
    wide = shape.width
    return (wide, wide, wide, shape.query_width, wide, wide, shape.neurons)


def _plan(layers: Any) -> GatePlan:
    return GatePlan(layers=tuple(layers))
