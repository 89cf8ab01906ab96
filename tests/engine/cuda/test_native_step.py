"""The compiled step's order of kernels, on CPU: with the kernels' meaning in their place it is the torch step."""

import dataclasses

import pytest
import torch
from plain_operators import PlainBatchOperators, PlainOperators
from tiny import make_model, token_ids

from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.step import sliced
from actsparse.engine.step.decoder import Decoder, Runner
from actsparse.engine.step.packing import TIER_1, weights_from_model
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, InputScores, NeuronPlan, column_norms
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.weights import input_rows, transpose_rows

CHANGES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0},
}
PLANS = ("dense", "sliced", "indexed", "cats", "countdown", "teal", "wina", "teal atomics")
NEW = 8


class PlainEngine:
    """`CudaEngine` without a device."""

    candidates = PlainOperators.blocks

    def __init__(self):
        self.warnings = []

    def runner(self, weights, state, plan, *, sampled, padded):
        operators = PlainOperators() if state.batch == 1 else PlainBatchOperators(state.batch)
        step = native_step(weights, state, plan, operators, sampled=sampled, padded=padded)
        return Runner(run=lambda live: step(), kind="eager")


def make_plan(kind, weights):
    shape = weights.shape
    down_rows, layers = transpose_rows(weights.down), shape.layers
    scores = torch.rand(layers, shape.neurons, generator=torch.Generator().manual_seed(0))
    match kind:
        case "dense":
            return DensePlan()
        case "sliced":
            plan = sliced.empty_plan(weights, 64)
            sliced.select_threshold(plan.selection, scores, torch.tensor([0.4, 0.6]))
            sliced.fill(plan, weights, down_rows)
            return plan
        case "indexed":
            selection = sliced.empty_selection(weights, 48)
            sliced.select_top(selection, scores, 20)
            return IndexedPlan(down_rows=down_rows, selection=selection)
        case "cats":
            return NeuronPlan(threshold=0.2 * scores, down_rows=down_rows)
        case "countdown":
            return NeuronPlan(threshold=torch.full((layers, 1), 0.5), down_rows=down_rows, first="up")
        case _:
            norms = InputScores(
                qkv=column_norms(weights.qkv, shape.qkv_widths),
                out=column_norms(weights.out, (shape.width,)),
                gate_up=column_norms(weights.gate_up, (shape.neurons, shape.neurons)),
                down=column_norms(weights.down, (shape.width,)),
            )
            return InputPlan(
                weights=input_rows(weights, down_rows),
                threshold=torch.tensor([0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.05]).repeat(layers, 1),
                scores=norms if kind == "wina" else None,
                fast_atomics=kind == "teal atomics",
            )


@torch.no_grad()
@pytest.mark.parametrize("model_type", TIER_1)
@pytest.mark.parametrize("kind", PLANS)
def test_the_native_step_is_the_torch_step(model_type, kind):
    model = make_model(model_type, **CHANGES.get(model_type, {})).double()
    weights, ids = weights_from_model(model), token_ids(1, 9)
    plan = make_plan(kind, weights)
    cache = model(ids, use_cache=True).past_key_values
    texts, logits = [], []
    for engine in (None, PlainEngine()):
        decoder = Decoder(weights, max_length=20, engine=engine)
        decoder.load_prefill(cache, torch.tensor([7]))
        decoder.set_plan(plan)
        texts.append(decoder.decode(NEW))
        logits.append(decoder.state.logits)
    assert torch.equal(texts[0], texts[1])
    torch.testing.assert_close(logits[1], logits[0])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("kind", ["dense", "sliced", "cats", "countdown", "teal", "wina"])
@pytest.mark.parametrize("padding", [None, (0, 3, 5)])
def test_the_native_step_of_a_batch_is_the_torch_step(model_type, kind, padding):
    model = make_model(model_type, **CHANGES.get(model_type, {})).double()
    weights, ids = weights_from_model(model), token_ids(3, 9)
    plan = make_plan(kind, weights)
    if kind == "sliced":
        mask = torch.rand(2, 3, plan.down.shape[1], generator=torch.Generator().manual_seed(1)) < 0.7
        plan = dataclasses.replace(plan, mask=mask.double())
    left = None if padding is None else torch.tensor(padding)
    texts, logits = [], []
    for engine in (None, PlainEngine()):
        decoder = Decoder(weights, max_length=20, batch=3, engine=engine)
        decoder.load_prefill(model(ids, use_cache=True).past_key_values, torch.tensor([7, 2, 5]), left)
        decoder.set_plan(plan)
        texts.append(decoder.decode(NEW))
        logits.append(decoder.state.logits)
    assert torch.equal(texts[0], texts[1])
    torch.testing.assert_close(logits[1], logits[0])


@torch.no_grad()
def test_the_native_step_draws_what_the_torch_step_draws():
    weights = weights_from_model(make_model("llama").double())
    texts = []
    for engine in (None, PlainEngine()):
        decoder = Decoder(weights, max_length=20, batch=2, engine=engine)
        decoder.sample(Sampling(temperature=1.5, top_p=0.9, seed=4))
        decoder.start(5, 0)
        texts.append(decoder.decode(15))
    assert torch.equal(*texts)
