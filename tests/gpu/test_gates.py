"""Plans of gates on the GPU: every stage of the compiled step against the torch step; replays against eager steps."""

from dataclasses import replace

import pytest
import torch
from gate_plans import FOLDED, KINDS, make_gate_plan

from actsparse.engine.cuda.engine import decoder_of
from actsparse.engine.cuda.native_gates import NativeGateStep, refusal
from actsparse.engine.step.gate_step import GateStep
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.state import set_hidden
from actsparse.engine.step.weights import random_weights

pytestmark = pytest.mark.gpu
SHAPE = Shape(name="s", layers=4, width=512, neurons=1376, heads=8, kv_heads=2, head_dim=64, vocab=1003, qkv_bias=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_equals_the_torch_step(draw, assert_near, kind):
    weights = random_weights(SHAPE, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=96)
    state, plan = decoder.state, make_gate_plan(kind, weights)
    assert refusal(plan, weights) is None
    native = NativeGateStep(weights, state, plan, decoder.engine.operators)
    plain = GateStep(weights, state, plan)
    state.keys.copy_(draw(*state.keys.shape))
    state.values.copy_(draw(*state.values.shape))
    state.position.fill_(70)
    seen = {}
    for layer in range(SHAPE.layers):
        hidden = draw(1, SHAPE.width)
        for name in ("attention", "mlp"):
            for buffer in (state.qkv, state.mix, state.branch, state.halves, state.neurons):
                buffer.fill_(torch.nan)
            want = getattr(plain, name)(layer, hidden.clone(), seen) - hidden
            set_hidden(state, hidden)
            native.begin()
            getattr(native, name)(layer)
            # An entry within rounding of a threshold may fall on its other side.
            assert_near(native.hidden - hidden, want, limit=5e-3)


@pytest.mark.parametrize("kind", [*KINDS, *FOLDED])
def test_replays_equal_eager_bit_for_bit(kind):
    weights = random_weights(SHAPE, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=64)
    plan = make_gate_plan(kind, weights)
    decoder.set_plan(plan)
    assert decoder.path == "graph", decoder.warnings
    assert not decoder.warnings
    runs = []
    for _ in range(2):
        decoder.start(5, 0)
        runs.append((decoder.decode(30), decoder.state.logits.clone()))
    if kind not in FOLDED:
        decoder.start(5, 0)
        eager = NativeGateStep(weights, decoder.state, plan, decoder.engine.operators)
        for _ in range(30):
            eager()
        runs.append((decoder.state.tokens[:, 1:31], decoder.state.logits))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_a_batch_with_lists_runs_the_torch_step_and_says_so():
    weights = random_weights(SHAPE, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=64, batch=2)
    plan = make_gate_plan("listed", weights)
    masks = torch.zeros(2, SHAPE.neurons, dtype=torch.uint8, device="cuda")
    layers = [replace(work, mlp=replace(work.mlp, mask=masks)) for work in plan.layers]
    decoder.set_plan(replace(plan, layers=tuple(layers)))
    assert decoder.path == "graph", decoder.warnings
    assert any("masks weights" in warning for warning in decoder.warnings)
    decoder.start(5, 0)
    tokens = decoder.decode(10)
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("kind", ["decided", "scored top", "routed ahead", "experts", "channels", "heads", "tops"])
def test_sequences_of_a_batch_decode_in_turns_as_each_alone(draw, kind):
    weights = random_weights(SHAPE, dtype=torch.bfloat16, device="cuda")
    plan, first = make_gate_plan(kind, weights), torch.tensor([5, 9, 700])
    decoder = decoder_of(weights, max_length=64, batch=3)
    keys, values = draw(*decoder.state.keys.shape), draw(*decoder.state.values.shape)
    decoder.state.keys.copy_(keys)
    decoder.state.values.copy_(values)
    decoder.set_plan(plan)
    assert decoder.path == "graph", decoder.warnings
    assert any("in turns" in warning for warning in decoder.warnings)
    decoder.start(first, 20)
    tokens = decoder.decode(12)
    for at in range(3):
        one = decoder_of(weights, max_length=64)
        one.state.keys.copy_(keys[:, at : at + 1])
        one.state.values.copy_(values[:, at : at + 1])
        one.set_plan(plan)
        one.start(first[at : at + 1], 20)
        assert torch.equal(one.decode(12)[0], tokens[at])
        assert torch.equal(one.state.logits[0], decoder.state.logits[at])
        assert torch.equal(one.state.keys[:, 0, :, :32], decoder.state.keys[:, at, :, :32])
