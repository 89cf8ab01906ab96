"""The CPU's own step on every tier-1 family: equal to transformers, and to the torch step under every common plan."""

import pytest
import torch
from tiny import FFN, HIDDEN, LAYERS, make_model, token_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from actsparse.engine.cpu.engine import CpuEngine
from actsparse.engine.step import sliced
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.packing import TIER_1
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, InputScores, NeuronPlan, Plan, column_norms
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.weights import Weights, input_rows, transpose_rows

PROMPT, NEW, LENGTH = 20, 12, 48
MARGIN = 1e-3

every_family = pytest.mark.parametrize("family", list(TIER_1))


@torch.no_grad()
def prefilled(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return cache, logits.argmax(dim=-1)


def decoder(model: PreTrainedModel, ids: Tensor, engine: CpuEngine | None) -> Decoder:
    cache, following = prefilled(model, ids)
    made = Decoder.from_model(model, max_length=LENGTH, batch=len(ids), engine=engine)
    made.load_prefill(cache, following)
    return made


def plans(weights: Weights) -> dict[str, Plan]:
    down_rows = transpose_rows(weights.down)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(LAYERS, FFN, generator=generator)
    cut = sliced.empty_plan(weights, 64)
    sliced.select_threshold(cut.selection, scores, torch.tensor([0.4, 0.7]))
    sliced.fill(cut, weights, down_rows)
    shape = weights.shape
    norms = InputScores(
        qkv=column_norms(weights.qkv, shape.qkv_widths),
        out=column_norms(weights.out, (HIDDEN,)),
        gate_up=column_norms(weights.gate_up, (FFN, FFN)),
        down=column_norms(weights.down, (HIDDEN,)),
    )
    rows = input_rows(weights, down_rows)
    inputs = torch.rand(LAYERS, 7, generator=generator) * 0.5
    return {
        "dense": DensePlan(),
        "sliced": cut,
        "indexed": IndexedPlan(down_rows=down_rows, selection=cut.selection),
        "gate": NeuronPlan(threshold=torch.full((LAYERS, 1), 0.2), down_rows=down_rows),
        "gate by neuron": NeuronPlan(threshold=scores * 0.5, down_rows=down_rows),
        "up": NeuronPlan(threshold=torch.full((LAYERS, 1), 0.4), down_rows=down_rows, first="up"),
        "inputs": InputPlan(weights=rows, threshold=inputs),
        "weighed inputs": InputPlan(weights=rows, threshold=inputs, scores=norms),
    }


@every_family
def test_greedy_text_is_the_models_own_until_it_is_a_tie(family: str) -> None:
    model, ids = make_model(family), token_ids(1, PROMPT)
    ours = decoder(model, ids, CpuEngine())
    text = ours.decode(NEW)[0].tolist()
    cache, token = prefilled(model, ids)
    for found in text:
        with torch.no_grad():
            logits = model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[0, -1]
        best = logits.topk(2).values
        if best[0] - best[1] < MARGIN:
            return
        token = logits.argmax(dim=-1, keepdim=True)
        assert found == int(token)
    assert ours.warnings == []
    assert ours.path == "compiled"


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_under_every_plan_are_those_of_the_torch_step(family: str, batch: int) -> None:
    model, ids = make_model(family), token_ids(batch, PROMPT)
    ours, theirs = decoder(model, ids, CpuEngine()), decoder(model, ids, None)
    forced = token_ids(batch, 5, seed=4)
    for name, plan in plans(ours.weights).items():
        for one in (ours, theirs):
            one.start(ids[:, -1], PROMPT)
            one.force(forced)
            one.set_plan(plan)
            one.state.logits.fill_(torch.nan)
            one.decode(3)
        torch.testing.assert_close(ours.state.logits, theirs.state.logits, atol=2e-5, rtol=1e-5, msg=name)
        assert torch.equal(ours.state.tokens, theirs.state.tokens), name


def test_padding_in_front_of_a_sequence_changes_nothing() -> None:
    model = make_model("llama")
    alone = decoder(model, token_ids(1, 15, seed=2), CpuEngine()).decode(NEW)
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), token_ids(1, 15, seed=2)], dim=1)
    both = torch.cat([token_ids(1, PROMPT), ids])
    mask = torch.ones_like(both)
    mask[1, :5] = 0
    cache = DynamicCache(config=model.config)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=both, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    made = Decoder.from_model(model, max_length=LENGTH, batch=2, engine=CpuEngine())
    made.load_prefill(cache, out.logits[:, -1].argmax(dim=-1), torch.tensor([0, 5]))
    assert torch.equal(made.decode(NEW)[1:], alone)


def test_sampling_is_that_of_the_torch_step_and_depends_on_the_seed() -> None:
    model, ids = make_model("llama"), token_ids(2, PROMPT)
    texts = []
    for engine, seed in ((CpuEngine(), 1), (None, 1), (CpuEngine(), 2)):
        one = decoder(model, ids, engine)
        one.sample(Sampling(temperature=0.8, top_p=0.9, seed=seed))
        texts.append(one.decode(NEW))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_bfloat16_is_near_float32_and_reads_bfloat16() -> None:
    model, ids = make_model("llama"), token_ids(1, PROMPT)
    exact = decoder(model, ids, CpuEngine())
    exact.decode(1)
    half = decoder(model.bfloat16(), ids, CpuEngine())
    theirs = decoder(model, ids, None)
    for one in (half, theirs):
        one.start(exact.state.tokens[:, PROMPT], PROMPT)
        one.decode(1)
    assert half.weights.dtype == torch.bfloat16
    assert half.path == "compiled"
    torch.testing.assert_close(half.state.logits, theirs.state.logits, atol=2e-2, rtol=2e-3)


def test_what_the_operators_do_not_take_runs_in_torch_and_is_announced() -> None:
    model, ids = make_model("llama"), token_ids(9, PROMPT)
    ours, theirs = decoder(model, ids, CpuEngine()), decoder(model, ids, None)
    assert torch.equal(ours.decode(4), theirs.decode(4))
    assert "batches of up to 8" in ours.warnings[0]
    assert ours.path == "eager"


def test_a_machine_without_compiler_runs_in_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from actsparse.engine.cpu import build

    monkeypatch.setattr(build, "_memory", {"library": build.BuildError("no compiler was found")})
    model, ids = make_model("llama"), token_ids(1, PROMPT)
    ours, theirs = decoder(model, ids, CpuEngine()), decoder(model, ids, None)
    for name, plan in plans(ours.weights).items():
        for one in (ours, theirs):
            one.start(ids[:, -1], PROMPT)
            one.set_plan(plan)
            one.decode(2)
        torch.testing.assert_close(ours.state.logits, theirs.state.logits, atol=2e-5, rtol=1e-5, msg=name)
    assert "no compiler was found" in ours.warnings[0]
