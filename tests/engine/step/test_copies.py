"""A batch's union of kept neurons, gathered: every sequence's text is that of its own mask."""

import pytest
import torch
from tiny import make_model, token_ids

from actsparse.engine.step.copies import capacity_of, gather, in_place, lists_alone, mask_all, room, union_density
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.gate_step import GateStep
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.translate import Translator, choose_all
from actsparse.methods.gates import FixedGate, LayerGates


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_union_of_a_batch_is_each_sequences_own_mask(model_type):
    changes = {"mlp_bias": True, "attention_bias": True} if model_type == "llama" else {}
    model = make_model(model_type, **changes).double()
    weights, ids = weights_from_model(model), token_ids(3, 9)
    layers, neurons = weights.shape.layers, weights.shape.neurons
    translator = Translator(weights)
    plan = translator.plan([LayerGates(neurons=FixedGate(torch.ones(neurons, dtype=torch.bool)))] * layers, 3)
    assert lists_alone(plan)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        masks = {i: torch.rand(3, neurons, generator=generator) < 0.3 for i in range(layers)}
        choose_all(plan, masks)
        wanted = torch.stack([mask.any(0).double().mean() for mask in masks.values()]).mean()
        assert union_density(plan) == pytest.approx(float(wanted))
        united = room(plan, translator, capacity_of(plan))
        assert united.down.shape[1] < neurons
        gather(plan, translator, united)
        every = in_place(plan, translator)
        mask_all(plan, every)
        assert every.gate_up is weights.gate_up, "all neurons are read where they are"
        texts, logits = [], []
        for kind in (plan, united, every):
            decoder = Decoder(weights, max_length=20, batch=3)
            decoder.load_prefill(cache, torch.tensor([7, 8, 9]))
            if kind is plan:
                step = GateStep(weights, decoder.state, plan)
                for _ in range(6):
                    step()
                texts.append(decoder.state.tokens[:, 10:16].clone())
            else:
                decoder.set_plan(kind)
                texts.append(decoder.decode(6))
            logits.append(decoder.state.logits.clone())
        assert torch.equal(texts[0], texts[1])
        assert torch.equal(texts[0], texts[2])
        for one in logits[1:]:
            torch.testing.assert_close(one, logits[0])
        found.append(logits[0])
    assert not torch.equal(found[0], found[1])
