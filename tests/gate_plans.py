"""Plans of every kind of gate, drawn at random, for tests on CPU and on GPU."""

import torch

from actsparse.engine.step.translate import Translator, choose_all
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import Channels, Chosen, Decided, GatePlan, Groups, LayerWork, Routed, Scored
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.results import SiteKind, Unit

KINDS = (
    "listed",
    "decided",
    "scored",
    "scored top",
    "routed",
    "routed ahead",
    "experts",
    "channels",
    "channels top",
    "rotated",
    "corrected",
    "heads",
    "mixed",
)
FOLDED = ("teal", "wina", "cats", "tops")


def make_gate_plan(kind: str, weights: Weights, seed: int = 0) -> GatePlan:
    """A plan of one kind in every layer; "mixed" has another in each."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("routed", "channels top", "listed", "decided") if kind == "mixed" else (kind,)
    translator = Translator(weights)
    return GatePlan(
        layers=tuple(
            _work(kinds[layer % len(kinds)], weights, translator, layer, generator)
            for layer in range(weights.shape.layers)
        )
    )


def _work(kind: str, weights: Weights, translator: Translator, layer: int, generator: torch.Generator) -> LayerWork:
    shape, device = weights.shape, weights.device
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, exact)

    down_rows = translator.input_rows(Unit.DOWN, layer)
    fill = draw(shape.neurons) * 0.1
    filled = {"down_rows": down_rows, "fill": fill, "base": fill @ down_rows.to(exact)}
    value = torch.full((1,), 0.3, device=device, dtype=exact)
    router = Chosen(
        first=draw(16, shape.width),
        second=draw(shape.neurons, 16),
        top=shape.neurons // 3,
        site=SiteKind.MLP_IN,
    )
    match kind:
        case "listed":
            gates = LayerGates(neurons=FixedGate(torch.rand(shape.neurons, generator=generator) < 0.5, fill=fill))
            plan = translator.plan([gates] * shape.layers, 1)
            choose_all(plan, {layer: gates.neurons.mask[None]})
            return plan.layers[layer]
        case "decided" | "cats":
            extra = filled if kind == "decided" else {"down_rows": down_rows}
            return LayerWork(mlp=Decided(threshold=value, gate_first=True, **extra))
        case "scored":
            return LayerWork(mlp=Scored(score=draw(shape.neurons).abs(), threshold=value, **filled))
        case "scored top":
            return LayerWork(mlp=Scored(top=shape.neurons // 2, **filled))
        case "routed":
            return LayerWork(mlp=Routed(router=router, **filled))
        case "routed ahead":
            ahead = Chosen(first=router.first, second=router.second, top=router.top, site=SiteKind.ATTN_IN, ahead=1)
            return LayerWork(mlp=Routed(router=ahead, down_rows=down_rows))
        case "experts":
            members = torch.randperm(shape.neurons, generator=generator)[: shape.neurons // 8 * 8].view(-1, 8)
            members = torch.cat([members, torch.full((len(members), 1), -1)], dim=1).to(device, torch.int32)
            experts = Chosen(
                second=draw(len(members), shape.width),
                top=shape.neurons // 2,
                site=SiteKind.MLP_IN,
                members=members,
                sizes=torch.full((len(members),), 8, dtype=torch.int32, device=device),
            )
            return LayerWork(mlp=Routed(router=experts, down_rows=down_rows))
        case "heads":
            heads = Chosen(second=draw(shape.kv_heads, shape.width), top=1, site=SiteKind.ATTN_IN)
            rows = torch.arange(shape.query_width, dtype=torch.int32, device=device).view(shape.kv_heads, -1)
            out_rows = translator.input_rows(Unit.O, layer)
            return LayerWork(heads=Groups(router=heads, out_rows=out_rows, query_rows=rows))
        case _:
            return LayerWork(channels=_channels(kind, translator, layer, value, draw))


def _channels(kind: str, translator: Translator, layer: int, value: torch.Tensor, draw) -> dict[str, Channels]:
    units = (Unit.Q, Unit.K, Unit.V, Unit.O, Unit.GATE, Unit.UP, Unit.DOWN)
    if kind in ("channels", "channels top"):
        units = (Unit.Q, Unit.V, Unit.UP, Unit.DOWN)  # the others run whole
    rules = {}
    for unit in units:
        rows = translator.input_rows(unit, layer)
        inputs, outputs = rows.shape
        score = draw(inputs).abs() if kind == "wina" else None
        if kind in ("channels top", "tops"):
            rules[unit.value] = Channels(rows=rows, top=inputs // 2, score=draw(inputs).abs())
        elif kind == "rotated":
            basis = torch.linalg.qr(draw(inputs, inputs).cpu().double())[0].to(draw(1))
            rotated = (basis.T @ rows.to(basis)).to(rows.dtype).contiguous()
            rules[unit.value] = Channels(rows=rotated, threshold=value, basis=basis.T.to(rows.dtype).contiguous())
        elif kind == "corrected":
            pair = (draw(outputs, 8) * 0.1).to(rows.dtype), (draw(8, inputs) * 0.1).to(rows.dtype)
            rules[unit.value] = Channels(rows=rows, threshold=value, correction=pair)
        else:
            rules[unit.value] = Channels(rows=rows, threshold=value, score=score)
    return rules
