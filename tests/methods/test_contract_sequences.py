"""The contract of every method about sequences: batches, padding, state, and the sliced engine.

In float64, where a marginal entry does not flip by rounding, sequences of a batch must be as if they were alone.
"""

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from test_contract import QUICK, VARIANTS
from tiny import make_model, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from actsparse.engine.decode import new_cache, step
from actsparse.engine.generation import sparse_generation
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.engine.sparse import sparse_decoder, why_not_sliced
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import fit_plan
from actsparse.methods.registry import all_methods
from actsparse.methods.short import parse
from actsparse.models.sites import resolve

NEW, PAD = 5, 3
every_method = pytest.mark.parametrize("name", [*(QUICK.get(name, name) for name in all_methods()), *VARIANTS])


@pytest.fixture(scope="module")
def exact(loaded) -> PreTrainedModel:
    """The tiny model in float64."""
    model = make_model("llama").double()
    assert torch.equal(model.lm_head.weight.float(), loaded.model.lm_head.weight)
    return model


def gates_of(name: str, loaded, calibration) -> list[LayerGates]:
    return fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0].gates()


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the decoded tokens, [batch, NEW, vocab]."""
    found = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(found.logits, dim=1)


@every_method
def test_a_left_padded_batch_is_its_sequences_alone(name, loaded, calibration, exact) -> None:
    gates = gates_of(name, loaded, calibration)
    long, short = token_ids(1, 18, seed=1), token_ids(1, 11, seed=2)
    padded = torch.cat([torch.full((1, 7), PAD), short], dim=1)
    mask = torch.cat([torch.ones_like(long), (padded != PAD).long()])
    mask[1, 7:] = 1
    with sparse_generation(resolve(exact), gates, sink_tokens=SINK):
        alone = [logits(exact, ids) for ids in (long, short)]
        both = logits(exact, torch.cat([long, padded]), mask)
    dense = logits(exact, long)
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone[0], dense, atol=1e-6)


@every_method
def test_nothing_is_left_of_the_sequence_before(name, loaded, calibration, exact) -> None:
    gates = gates_of(name, loaded, calibration)
    first, second = token_ids(1, 16, seed=3), token_ids(1, 16, seed=4)
    with sparse_generation(resolve(exact), gates, sink_tokens=SINK):
        fresh = logits(exact, second)
    with sparse_generation(resolve(exact), gates, sink_tokens=SINK):
        logits(exact, first)
        again = logits(exact, second)
    assert torch.equal(again, fresh)


@every_method
def test_the_sliced_engine_is_the_masked_path(name, loaded, calibration, exact) -> None:
    gates, sites = gates_of(name, loaded, calibration), resolve(exact)
    reason = why_not_sliced(gates)
    if reason:
        pytest.skip(reason)
    ids = token_ids(1, BLOCK, seed=5)
    with torch.no_grad(), masked(sites, MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)):
        expected = exact(input_ids=ids, use_cache=False).logits[0, PROMPT:]
    with sparse_decoder(sites, gates, sink_tokens=SINK) as decoder:
        cache = new_cache(exact, BLOCK)
        decoder.prefill(ids[:, :PROMPT], cache)
        decoder.select()
        found = [step(exact, ids[:, t : t + 1], torch.tensor([[t]]), cache)[0] for t in range(PROMPT, BLOCK)]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-8, atol=1e-8)
