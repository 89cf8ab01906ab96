"""The engine of the CPU: from a plan to a step of compiled operators, or of torch's where they cannot be had."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actsparse.engine.cpu import build
from actsparse.engine.cpu.emit import Choice
from actsparse.engine.cpu.ops import MAX_BATCH
from actsparse.engine.cpu.program import Program
from actsparse.engine.cpu.step import StepBuilder
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.decoder import Runner
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.state import DecodeState, embed, set_hidden
from actsparse.engine.step.torch_step import drawn
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import Channels, Decided, GatePlan, LayerWork, Listed

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class CpuEngine:
    """Makes steps of C++ operators; `warnings` says when torch computes them instead, and why."""

    note: Callable[[str], None] = lambda _text: None
    warnings: list[str] = field(default_factory=list)
    candidates: int = 1
    counters: dict[int, list[Counter]] = field(default_factory=dict)
    choices: dict[int, list[Choice]] = field(default_factory=dict)

    def runner(
        self, weights: Weights, state: DecodeState, plan: Plan | GatePlan, *, sampled: bool, padded: bool
    ) -> Runner:
        """The step of `plan`; padding needs no step of its own."""
        handle = None
        refusal = self.refusal(weights, state)
        if refusal is None:
            handle = build.library(self.note)
        elif refusal not in self.warnings:
            self.warnings.append(refusal)
        builder = StepBuilder(weights, state, plan if isinstance(plan, GatePlan) else as_gate_plan(plan, weights))
        ops = builder.layers()
        self.counters.setdefault(id(plan), []).extend(
            builder.counters
        )  # of each of its steps: padded, sampled, neither
        self.choices[id(plan)] = builder.choices
        if not sampled:
            program = Program([*ops, *builder.next_token()], handle)
            return Runner(run=lambda _live: program.run(), kind="compiled" if handle else "eager")
        program = Program(ops, handle)

        def run(_live: int) -> None:
            program.run()
            following = (state.position + 1).clamp(max=state.max_length - 1).long()
            forced = state.forced[:, following]
            token = torch.where(forced >= 0, forced, drawn(state, following)[:, None])
            state.tokens.index_copy_(1, following, token)
            set_hidden(state, embed(weights, token[:, 0]))
            state.position.copy_(following)

        return Runner(run=run, kind="compiled" if handle else "eager")

    def forget(self, plan: Plan | GatePlan) -> None:
        """Let go of what is held for the steps of `plan`."""
        self.counters.pop(id(plan), None)
        self.choices.pop(id(plan), None)

    def refusal(self, weights: Weights, state: DecodeState) -> str | None:
        """Why the compiled operators cannot serve this, or None if they can."""
        if weights.dtype not in DTYPES:
            return f"decode runs in torch: the CPU operators take float32 and bfloat16, not {weights.dtype}"
        if state.batch > MAX_BATCH:
            return f"decode runs in torch: the CPU operators take batches of up to {MAX_BATCH}, not {state.batch}"
        failure = build.failure(self.note)
        return None if failure is None else f"decode runs in torch: {failure}"


def as_gate_plan(plan: Plan, weights: Weights) -> GatePlan:
    """The work of every layer under one of the engines' common plans."""
    return GatePlan(layers=tuple(_work(plan, weights, layer) for layer in range(weights.shape.layers)))


def _work(plan: Plan, weights: Weights, layer: int) -> LayerWork:
    match plan:
        case DensePlan():
            return LayerWork()
        case SlicedPlan():
            gate, up = plan.gate_up[layer].chunk(2)
            gate_bias, up_bias = _halves(plan.gate_up_bias, layer)
            return LayerWork(
                mlp=Listed(
                    gate=gate,
                    up=up,
                    down_rows=plan.down[layer],
                    index=torch.arange(len(gate), dtype=torch.int32),
                    count=plan.selection.count[layer : layer + 1],
                    gate_bias=gate_bias,
                    up_bias=up_bias,
                )
            )
        case IndexedPlan():
            gate, up = weights.gate_up[layer].chunk(2)
            gate_bias, up_bias = _halves(weights.gate_up_bias, layer)
            return LayerWork(
                mlp=Listed(
                    gate=gate,
                    up=up,
                    down_rows=plan.down_rows[layer],
                    index=plan.selection.index[layer],
                    count=plan.selection.count[layer : layer + 1],
                    gate_bias=gate_bias,
                    up_bias=up_bias,
                )
            )
        case NeuronPlan():
            threshold = plan.threshold[layer].contiguous()
            decided = Decided(threshold=threshold, down_rows=plan.down_rows[layer], gate_first=plan.first == "gate")
            return LayerWork(mlp=decided)
        case InputPlan():
            return LayerWork(channels=_channels(plan, weights, layer))


def _halves(bias: Tensor | None, layer: int) -> tuple[Tensor | None, Tensor | None]:
    if bias is None:
        return None, None
    gate, up = bias[layer].chunk(2)
    return gate, up


def _channels(plan: InputPlan, weights: Weights, layer: int) -> dict[str, Channels]:
    q, k, v = plan.weights.qkv[layer].split(weights.shape.qkv_widths, dim=1)
    gate, up = plan.weights.gate_up[layer].chunk(2, dim=1)
    rows = {
        "q": q, "k": k, "v": v, "o": plan.weights.out[layer], "gate": gate, "up": up, "down": plan.weights.down[layer],
    }  # fmt: skip
    scores: list[Tensor | None] = [None] * len(rows)
    if plan.scores is not None:
        parts = (plan.scores.qkv, plan.scores.out, plan.scores.gate_up, plan.scores.down)
        scores = [part[layer, i].contiguous() for part in parts for i in range(part.shape[1])]
    thresholds = plan.threshold[layer]
    return {
        name: Channels(rows=matrix, threshold=thresholds[i : i + 1], score=scores[i])
        for i, (name, matrix) in enumerate(rows.items())
    }
