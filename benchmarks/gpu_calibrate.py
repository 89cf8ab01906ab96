"""Thresholds for random weights: quantiles of the activations that a decoder itself produces, a layer at a time."""

import torch
from torch import Tensor

from actsparse.engine.cuda.engine import CudaEngine
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step import reference
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import InputPlan, NeuronPlan


def operators_of(decoder: Decoder) -> Operators:
    """The compiled kernels of a decoder on a CUDA device."""
    engine = decoder.engine
    assert isinstance(engine, CudaEngine)
    assert engine.operators is not None, engine.warnings
    return engine.operators


def fit_neurons(decoder: Decoder, plan: NeuronPlan, share: float) -> None:
    """Sets the plan's thresholds so that `share` of the neurons is dropped on the token at hand."""
    weights = decoder.weights
    step = native_step(weights, decoder.state, plan, operators_of(decoder))
    gate = weights.shape.neurons
    step.begin()
    for layer in range(weights.shape.layers):
        step.attention(layer)
        x = reference.rms_norm(step.hidden, weights.mlp_norm[layer], weights.shape.norm_epsilon)
        first = reference.activate(weights.gate_up[layer, :gate].float() @ x[0], weights.shape.activation)
        plan.threshold[layer] = first.abs().quantile(share)
        step.mlp(layer)


def realised_neurons(decoder: Decoder, plan: NeuronPlan) -> float:
    """The share of neurons that the plan drops on the token at hand, over all layers."""
    state, step = decoder.state, native_step(decoder.weights, decoder.state, plan, operators_of(decoder))
    dropped = []
    step.begin()
    for layer in range(decoder.weights.shape.layers):
        step.attention(layer)
        step.mlp(layer)
        dropped.append((state.halves[0, : decoder.weights.shape.neurons] == 0).float().mean())
    return torch.stack(dropped).mean().item()


def fit_inputs(decoder: Decoder, plan: InputPlan, share: float) -> None:
    """Sets the plan's thresholds so that `share` of every projection's inputs is dropped on the token at hand."""
    _walk(decoder, plan, lambda layer, where, x: plan.threshold[layer, where].fill_(x.abs().quantile(share).item()))


def realised_inputs(decoder: Decoder, plan: InputPlan) -> float:
    """The share of weights not read on the token at hand."""
    shape = decoder.weights.shape
    sizes = (shape.width * shape.qkv_width, shape.query_width * shape.width, 2 * shape.mlp_weights / 3)
    weight = dict(zip((0, 3, 4, 6), (*sizes, shape.mlp_weights / 3), strict=True))
    dropped = []

    def count(layer: int, where: slice, x: Tensor) -> None:
        share = (x.abs() < plan.threshold[layer, where.start]).float().mean().item()
        dropped.append((share * weight[where.start], weight[where.start]))

    _walk(decoder, plan, count)
    return sum(one for one, _ in dropped) / sum(two for _, two in dropped)


def _walk(decoder: Decoder, plan: InputPlan, visit) -> None:
    """Runs the step a stage at a time and shows every product's input before or just after it is used."""
    weights, state = decoder.weights, decoder.state
    shape, step = weights.shape, native_step(weights, state, plan, operators_of(decoder))
    step.begin()
    for layer in range(shape.layers):
        visit(layer, slice(0, 3), reference.rms_norm(step.hidden, weights.attn_norm[layer], shape.norm_epsilon))
        step.attention(layer)
        visit(layer, slice(3, 4), state.mix)
        visit(layer, slice(4, 6), reference.rms_norm(step.hidden, weights.mlp_norm[layer], shape.norm_epsilon))
        step.mlp(layer)
        gate, up = step.halves.chunk(2, dim=1)
        visit(layer, slice(6, 7), reference.activate(gate, shape.activation) * up)
