"""The same decode step in torch: the meaning of the compiled one, and its fallback, compiled per layer where asked.

All layers share one compiled function, since their tensors differ in address only.
"""

from typing import Any, assert_never

import torch
from torch import Tensor

from actsparse.engine.cuda import reference
from actsparse.engine.cuda.input_sparse import InputPlan, input_sparse_product
from actsparse.engine.cuda.layout import Weights
from actsparse.engine.cuda.neuron_sparse import NeuronPlan, neuron_sparse_mlp
from actsparse.engine.cuda.sliced import IndexedPlan, SlicedPlan
from actsparse.engine.cuda.state import DecodeState, set_hidden
from actsparse.engine.cuda.step import DensePlan, Plan

# Turns batch-1 products into fused multiply-and-sum kernels; `max_autotune` alone does not.
COMPILE_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


class TorchStep:
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(self, weights: Weights, state: DecodeState, plan: Plan, *, compiled: bool) -> None:
        self._weights = weights
        self._state = state
        self._plan = plan

        def build(function):
            return torch.compile(function, options=COMPILE_OPTIONS, dynamic=False) if compiled else function

        self._attention = build(_attention)
        self._dense = build(_dense)
        self._sliced = build(_sliced)
        self._head = build(_head)

    def __call__(self) -> None:
        state = self._state
        hidden = state.hidden
        for layer in range(self._weights.shape.layers):
            hidden = self.attention(layer, hidden)
            hidden = self.mlp(layer, hidden)
        self.next_token(hidden)

    def attention(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden [width] plus the attention of layer `layer`."""
        weights, state = self._weights, self._state
        cache = (state.keys[layer], state.values[layer], state.position, *state.angles)
        norm, epsilon = weights.attn_norm[layer], weights.shape.norm_epsilon
        bias = None if weights.qkv_bias is None else weights.qkv_bias[layer]
        if not isinstance(self._plan, InputPlan):
            return self._attention(hidden, norm, weights.qkv[layer], bias, weights.out[layer], cache, epsilon)
        plan, shape = self._plan, weights.shape
        x = reference.rms_norm(hidden, norm, epsilon)
        score = plan.scores.qkv[layer] if plan.scores else (None,) * 3
        widths = (shape.query_width, shape.kv_width, shape.kv_width)
        parts = plan.weights.qkv[layer].split(widths, dim=1)
        qkv = torch.cat(
            [
                input_sparse_product(part, x, plan.threshold[layer, i : i + 1], score[i], atomics=plan.fast_atomics)
                for i, part in enumerate(parts)
            ]
        )
        mix = reference.attend(qkv if bias is None else qkv + bias, *cache)
        return hidden + input_sparse_product(
            plan.weights.out[layer],
            mix,
            plan.threshold[layer, 3:4],
            plan.scores.out[layer, 0] if plan.scores else None,
            atomics=plan.fast_atomics,
        )

    def mlp(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden [width] plus the MLP of layer `layer` under the plan."""
        weights = self._weights
        norm, epsilon, activation = weights.mlp_norm[layer], weights.shape.norm_epsilon, weights.shape.activation
        match self._plan:
            case DensePlan():
                return self._dense(hidden, norm, weights.gate_up[layer], weights.down[layer], epsilon, activation)
            case SlicedPlan() as plan:
                return self._sliced(hidden, norm, plan.gate_up[layer], plan.down[layer], epsilon, activation)
            case IndexedPlan() as plan:
                live = torch.arange(plan.selection.index.shape[1], device=hidden.device) < plan.selection.count[layer]
                index = plan.selection.index[layer]
                gate, up = (half[index] for half in weights.gate_up[layer].chunk(2))
                x = reference.rms_norm(hidden, norm, epsilon)
                neurons = reference.gated(torch.cat([gate, up]), x, activation) * live
                return hidden + reference.project_rows(plan.down_rows[layer][index], neurons)
            case NeuronPlan() as plan:
                x = reference.rms_norm(hidden, norm, epsilon)
                return hidden + neuron_sparse_mlp(
                    weights.gate_up[layer], plan.down_rows[layer], x, plan.threshold[layer], activation, plan.first
                )
            case InputPlan() as plan:
                x = reference.rms_norm(hidden, norm, epsilon)
                score = plan.scores.gate_up[layer] if plan.scores else (None, None)
                halves = plan.weights.gate_up[layer].split(weights.shape.neurons, dim=1)
                gate, up = (
                    input_sparse_product(
                        half, x, plan.threshold[layer, 4 + i : 5 + i], score[i], atomics=plan.fast_atomics
                    )
                    for i, half in enumerate(halves)
                )
                return hidden + input_sparse_product(
                    plan.weights.down[layer],
                    reference.activate(gate, activation) * up,
                    plan.threshold[layer, 6:7],
                    plan.scores.down[layer, 0] if plan.scores else None,
                    atomics=plan.fast_atomics,
                )
            case _ as unknown:
                assert_never(unknown)

    def next_token(self, hidden: Tensor) -> None:
        """Logits, argmax (or the forced token), and its embedding in the state."""
        weights, state = self._weights, self._state
        state.logits.copy_(self._head(hidden, weights.final_norm, weights.head, weights.shape.norm_epsilon))
        following = (state.position + 1).clamp(max=state.max_length - 1).long()
        forced = state.forced[following]
        token = torch.where(forced >= 0, forced, state.logits.argmax())
        state.tokens.index_copy_(0, following, token)
        set_hidden(state, weights.embedding[token][0])
        state.position.copy_(following)


def _attention(hidden, norm, qkv, bias, out, cache, epsilon):
    projected = reference.project(qkv, reference.rms_norm(hidden, norm, epsilon), bias)
    return hidden + reference.project(out, reference.attend(projected, *cache))


def _dense(hidden, norm, gate_up, down, epsilon, activation):
    neurons = reference.gated(gate_up, reference.rms_norm(hidden, norm, epsilon), activation)
    return hidden + reference.project(down, neurons)


def _sliced(hidden, norm, gate_up, down_rows, epsilon, activation):
    neurons = reference.gated(gate_up, reference.rms_norm(hidden, norm, epsilon), activation)
    return hidden + reference.project_rows(down_rows, neurons)


def _head(hidden, norm, head, epsilon):
    return reference.project(head, reference.rms_norm(hidden, norm, epsilon))
