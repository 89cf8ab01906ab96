"""Plans of gates: the compiled step, with its kernels' meaning in their place, is the torch step; so is the CPU's."""

import pytest
import torch
from gate_plans import FOLDED, KINDS, make_gate_plan
from plain_operators import PlainOperators
from tiny import make_model, token_ids

from actsparse.engine.cpu.engine import CpuEngine
from actsparse.engine.cuda.fold import fold
from actsparse.engine.cuda.in_turns import InTurns
from actsparse.engine.cuda.native_gates import NativeGateStep, refusal
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.step.decoder import Decoder, Runner
from actsparse.engine.step.gate_step import GateStep
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.work import GatePlan

NEW = 6


class StepEngine:
    """An engine of one kind of step."""

    candidates = PlainOperators.blocks

    def __init__(self, make):
        self.warnings = []
        self._make = make

    def runner(self, weights, state, plan, *, sampled, padded):
        if not isinstance(plan, GatePlan):
            return Runner(run=lambda live: None, kind="eager")
        step = self._make(weights, state, plan)
        return Runner(run=lambda live: step(), kind="eager")


def native(weights, state, plan):
    assert refusal(plan, weights) is None
    return NativeGateStep(weights, state, plan, PlainOperators())


def decoded(model, plan, engine, weights):
    with torch.no_grad():
        cache = model(token_ids(1, 9), use_cache=True).past_key_values
        decoder = Decoder(weights, max_length=20, engine=engine)
        decoder.load_prefill(cache, torch.tensor([7]))
        decoder.set_plan(plan)
        return decoder.decode(NEW), decoder.state.logits.clone()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_step_is_the_torch_step(model_type, kind):
    changes = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    model = make_model(model_type, **changes).double()
    weights = weights_from_model(model)
    plan = make_gate_plan(kind, weights)
    text, logits = decoded(model, plan, StepEngine(GateStep), weights)
    found, got = decoded(model, plan, StepEngine(native), weights)
    assert torch.equal(found, text)
    torch.testing.assert_close(got, logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["scored top", "routed ahead", "teal", "tops"])
def test_sequences_in_turns_are_the_torch_step_of_a_batch(model_type, kind):
    model = make_model(model_type).double()
    weights = weights_from_model(model)
    plan = make_gate_plan(kind, weights)

    def alone(state):
        folded, operators = fold(plan), PlainOperators()
        return native_step(weights, state, folded, operators) if folded else native(weights, state, plan)

    found = []
    for make in (GateStep, lambda weights, state, plan: InTurns(state, alone, PlainOperators.blocks)):
        decoder = Decoder(weights, max_length=20, batch=3, engine=StepEngine(make))
        with torch.no_grad():
            decoder.load_prefill(model(token_ids(3, 9), use_cache=True).past_key_values, torch.tensor([7, 2, 5]))
            decoder.set_plan(plan)
            found.append((decoder.decode(NEW), decoder.state.logits, decoder.state.keys))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_step_is_the_one_of_the_cpu(kind):
    model = make_model("llama")
    weights = weights_from_model(model)
    plan = make_gate_plan(kind, weights)
    text, logits = decoded(model, plan, StepEngine(GateStep), weights)
    found, got = decoded(model, plan, CpuEngine(), weights)
    assert torch.equal(found, text)
    torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", FOLDED)
def test_gates_that_are_the_same_everywhere_are_folded(kind):
    model = make_model("llama").double()
    weights = weights_from_model(model)
    plan = make_gate_plan(kind, weights)
    folded = fold(plan)
    assert folded is not None
    text, logits = decoded(model, plan, StepEngine(GateStep), weights)
    decoder = Decoder(weights, max_length=20)
    with torch.no_grad():
        decoder.load_prefill(model(token_ids(1, 9), use_cache=True).past_key_values, torch.tensor([7]))
    decoder.set_plan(folded)
    assert torch.equal(decoder.decode(NEW), text)
    torch.testing.assert_close(decoder.state.logits, logits)
    compiled = StepEngine(lambda weights, state, plan: native_step(weights, state, fold(plan), PlainOperators()))
    found, got = decoded(model, plan, compiled, weights)
    assert torch.equal(found, text)
    torch.testing.assert_close(got, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_others_are_not(kind):
    assert fold(make_gate_plan(kind, weights_from_model(make_model("llama")))) is None
