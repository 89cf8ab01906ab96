"""Plans of the decode step on CPU: every plan that keeps all equals dense, and those that do not mean what they say."""

import pytest
import torch
from tiny import make_model, token_ids

from actsparse.engine.step import reference, sliced
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan
from actsparse.engine.step.sampling import Sampling, draw
from actsparse.engine.step.shape import SHAPES
from actsparse.engine.step.weights import input_rows, padded, transpose_rows
from actsparse.errors import PlanError

PROMPT, NEW, NEURONS = 9, 12, 48
LAYERS, WIDTH = 2, 32


@torch.no_grad()
def prefilled(model):
    """A decoder that continues a prompt, a way back to its start, and the text that transformers generates."""
    ids = token_ids(1, PROMPT)
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[:, PROMPT + 1 :]
    out = model(ids, use_cache=True)
    decoder = Decoder.from_model(model, max_length=40)

    def restart():
        decoder.load_prefill(out.past_key_values, out.logits[:, -1].argmax(-1))

    restart()
    return decoder, restart, want


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_plans_that_keep_everything_equal_dense(changes):
    decoder, restart, want = prefilled(make_model("llama", **changes))
    weights, down_rows = decoder.weights, transpose_rows(decoder.weights.down)
    nothing = torch.zeros(LAYERS, 1)
    full = sliced.empty_plan(weights, sliced.capacity_for(NEURONS))
    sliced.select_top(full.selection, torch.rand(LAYERS, NEURONS), NEURONS)
    sliced.fill(full, weights, down_rows)
    plans = (
        NeuronPlan(threshold=nothing, down_rows=down_rows),
        NeuronPlan(threshold=nothing, down_rows=down_rows, first="up"),
        InputPlan(weights=input_rows(weights, down_rows), threshold=torch.zeros(LAYERS, 7)),
        full,
        IndexedPlan(down_rows=down_rows, selection=full.selection),
    )
    for plan in plans:
        decoder.set_plan(plan)
        restart()
        assert torch.equal(decoder.decode(NEW - 1), want), type(plan).__name__


def test_slices_hold_the_kept_neurons_and_zeros_behind_them():
    decoder, restart, _ = prefilled(make_model("llama"))
    weights, down_rows = decoder.weights, transpose_rows(decoder.weights.down)
    plan = sliced.empty_plan(weights, 64)
    scores = torch.rand(LAYERS, NEURONS)
    threshold = torch.tensor([0.3, 0.9])
    sliced.select_threshold(plan.selection, scores, threshold)
    sliced.fill(plan, weights, down_rows)
    assert torch.equal(plan.selection.count.long(), (scores >= threshold[:, None]).sum(1))
    x = torch.randn(1, WIDTH)
    for layer, count in enumerate(plan.selection.count):
        assert (plan.gate_up[layer].view(2, 64, -1)[:, count:] == 0).all()
        assert (plan.down[layer, count:] == 0).all()
        kept = torch.zeros(NEURONS).index_fill(0, plan.selection.index[layer, :count].long(), 1.0)
        want = (kept * reference.gated(weights.gate_up[layer], x, "silu")) @ weights.down[layer].T
        got = reference.project_rows(plan.down[layer], reference.gated(plan.gate_up[layer], x, "silu"))
        torch.testing.assert_close(got, want)
    decoder.set_plan(plan)
    restart()
    text = decoder.decode(NEW)
    decoder.set_plan(IndexedPlan(down_rows=down_rows, selection=plan.selection))
    restart()
    assert torch.equal(decoder.decode(NEW), text)


def test_selection_refuses_more_than_the_capacity():
    decoder, _, _ = prefilled(make_model("llama"))
    selection = sliced.empty_selection(decoder.weights, 32)
    with pytest.raises(PlanError, match="do not fit"):
        sliced.select_top(selection, torch.rand(LAYERS, NEURONS), 33)
    with pytest.raises(PlanError, match="do not fit"):
        sliced.select_threshold(selection, torch.ones(LAYERS, NEURONS), torch.zeros(LAYERS))


def test_forced_tokens_replace_the_models_own():
    decoder, restart, want = prefilled(make_model("llama"))
    forced = (want[:, :5] + 1) % 97
    decoder.force(forced)
    assert torch.equal(decoder.decode(5), forced)
    decoder.force(None)
    restart()
    assert torch.equal(decoder.decode(NEW - 1), want)


def test_the_cache_is_not_overrun():
    decoder, _, _ = prefilled(make_model("llama"))
    with pytest.raises(PlanError, match="do not fit"):
        decoder.decode(31)


def test_step_bytes_of_the_benchmark_shape():
    # Llama-2-7B: 6,738,415,616 parameters, less the input embedding and the norms, in 16 bits.
    shape = SHAPES["llama-2-7b"]
    assert shape.step_bytes(position=0) == 2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)
    assert shape.step_bytes(position=512) - shape.step_bytes(position=0) == 32 * 2 * 4096 * 512 * 2


def test_padded_rows_are_aligned_and_equal():
    matrix = torch.randn(5, 577).bfloat16()
    assert padded(matrix).stride(0) % 8 == 0
    assert torch.equal(padded(matrix), matrix)


def test_a_seed_draws_the_same_text_and_a_cold_temperature_the_greedy_one():
    decoder, restart, want = prefilled(make_model("llama"))
    texts = []
    for seed, temperature in ((1, 0.7), (2, 0.7), (1, 0.7), (3, 1e-4)):
        decoder.sample(Sampling(temperature=temperature, seed=seed))
        restart()
        texts.append(decoder.decode(NEW - 1))
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])
    assert torch.equal(texts[3], want)
    decoder.sample(None)
    restart()
    assert torch.equal(decoder.decode(NEW - 1), want)


def test_draws_follow_the_cut_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    count = 20000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits.expand(count, 4), uniform, torch.tensor([0.8]), torch.tensor([0.9]))
    share = (logits / 0.8).softmax(-1)
    kept = torch.tensor([share[0], 0, share[2], 0])  # 0.74 and 0.21: the two that hold 0.9
    assert share[0] < 0.9 <= share[0] + share[2]
    torch.testing.assert_close(drawn.bincount(minlength=4) / count, kept / kept.sum(), rtol=0, atol=0.01)


def test_plans_can_be_forgotten():
    decoder, restart, want = prefilled(make_model("llama"))
    dense = DensePlan()
    decoder.set_plan(dense)
    decoder.forget_plan(dense)
    restart()
    assert torch.equal(decoder.decode(NEW - 1), want)


def test_sampling_refuses_what_is_no_distribution():
    for options in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(PlanError):
            Sampling(**options)
