"""The torch step, on CPU: equal to transformers, and every plan that keeps all equal to dense."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from actsparse.engine.cuda import reference, sliced
from actsparse.engine.cuda.decoder import Decoder
from actsparse.engine.cuda.input_sparse import InputPlan
from actsparse.engine.cuda.layout import SHAPES, input_rows, padded, share_storage, transpose_rows
from actsparse.engine.cuda.neuron_sparse import NeuronPlan
from actsparse.errors import ModelError, PlanError

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "tied llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama 3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 48}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}
PROMPT, NEW = 9, 12


def tiny(family, **overrides):
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    made = model(config(**(sizes | extra | overrides))).eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide their absence
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return made


@torch.no_grad()
def prefilled(model, **options):
    """A decoder that continues a prompt, a way back to its start, and the text that transformers generates."""
    ids = torch.randint(0, 97, (1, PROMPT))
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[0, PROMPT + 1 :]
    out = model(ids, use_cache=True)
    layers = out.past_key_values.layers
    decoder = Decoder.from_model(model, max_length=40, **options)

    def restart():
        decoder.load_cache([l.keys for l in layers], [l.values for l in layers], int(out.logits[0, -1].argmax()))

    restart()
    return decoder, restart, want


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_generate(family):
    decoder, _, want = prefilled(tiny(family))
    assert torch.equal(decoder.decode(NEW - 1), want)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_plans_that_keep_everything_equal_dense(family):
    decoder, restart, want = prefilled(tiny(family))
    weights, down_rows = decoder.weights, transpose_rows(decoder.weights.down)
    nothing = torch.zeros(3, 1)
    full = sliced.empty_plan(weights, sliced.capacity_for(80))
    sliced.select_top(full.selection, torch.rand(3, 80), 80)
    sliced.fill(full, weights, down_rows, None)
    plans = (
        NeuronPlan(threshold=nothing, down_rows=down_rows),
        NeuronPlan(threshold=nothing, down_rows=down_rows, first="up"),
        InputPlan(weights=input_rows(weights, down_rows), threshold=torch.zeros(3, 7)),
        full,
        sliced.IndexedPlan(down_rows=down_rows, selection=full.selection),
    )
    for plan in plans:
        decoder.set_plan(plan)
        restart()
        assert torch.equal(decoder.decode(NEW - 1), want), type(plan).__name__


def test_slices_hold_the_kept_neurons_and_zeros_behind_them():
    decoder, restart, _ = prefilled(tiny("llama"))
    weights, down_rows = decoder.weights, transpose_rows(decoder.weights.down)
    plan = sliced.empty_plan(weights, 64)
    scores = torch.rand(3, 80)
    threshold = torch.tensor([0.3, 0.5, 0.9])
    sliced.select_threshold(plan.selection, scores, threshold)
    sliced.fill(plan, weights, down_rows, None)
    assert torch.equal(plan.selection.count.long(), (scores >= threshold[:, None]).sum(1))
    x = torch.randn(48)
    for layer, count in enumerate(plan.selection.count):
        assert (plan.gate_up[layer].view(2, 64, -1)[:, count:] == 0).all()
        assert (plan.down[layer, count:] == 0).all()
        kept = torch.zeros(80).index_fill(0, plan.selection.index[layer, :count].long(), 1.0)
        want = weights.down[layer] @ (kept * reference.gated(weights.gate_up[layer], x, "silu"))
        got = reference.project_rows(plan.down[layer], reference.gated(plan.gate_up[layer], x, "silu"))
        torch.testing.assert_close(got, want)
    decoder.set_plan(plan)
    restart()
    text = decoder.decode(NEW)
    decoder.set_plan(sliced.IndexedPlan(down_rows=down_rows, selection=plan.selection))
    restart()
    assert torch.equal(decoder.decode(NEW), text)


def test_selection_refuses_more_than_the_capacity():
    decoder, _, _ = prefilled(tiny("llama"))
    selection = sliced.empty_selection(decoder.weights, 64)
    with pytest.raises(PlanError, match="do not fit"):
        sliced.select_top(selection, torch.rand(3, 80), 65)
    with pytest.raises(PlanError, match="do not fit"):
        sliced.select_threshold(selection, torch.ones(3, 80), torch.zeros(3))


def test_forced_tokens_replace_the_models_own():
    decoder, restart, want = prefilled(tiny("llama"))
    forced = (want[:5] + 1) % 97
    decoder.force(forced)
    assert torch.equal(decoder.decode(5), forced)
    decoder.force(None)
    restart()
    assert torch.equal(decoder.decode(NEW - 1), want)


def test_the_cache_is_not_overrun():
    decoder, _, _ = prefilled(tiny("llama"))
    with pytest.raises(PlanError, match="do not fit"):
        decoder.decode(31)


def test_sharing_storage_changes_no_logit():
    model = tiny("qwen2")
    ids = torch.randint(0, 97, (1, 7))
    decoder = Decoder.from_model(model, max_length=16)
    before = model(ids).logits
    share_storage(model, decoder.weights)
    assert torch.equal(model(ids).logits, before)
    assert model.model.layers[1].mlp.up_proj.weight.data_ptr() == decoder.weights.gate_up[1, 80:].data_ptr()


def test_what_the_step_does_not_compute_is_refused():
    with pytest.raises(ModelError, match="sliding window"):
        Decoder.from_model(tiny("mistral"), max_length=49)
    with pytest.raises(ModelError, match="bias"):
        Decoder.from_model(tiny("llama", attention_bias=True), max_length=16)
    with pytest.raises(ModelError, match="activation"):
        Decoder.from_model(tiny("llama", hidden_act="tanh"), max_length=16)


def test_step_bytes_of_the_benchmark_shape():
    # Llama-2-7B: 6,738,415,616 parameters, less the input embedding and the norms, in 16 bits.
    shape = SHAPES["llama-2-7b"]
    assert shape.step_bytes(position=0) == 2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)
    assert shape.step_bytes(position=512) - shape.step_bytes(position=0) == 32 * 2 * 4096 * 512 * 2


def test_padded_rows_are_aligned_and_equal():
    matrix = torch.randn(5, 577).bfloat16()
    assert padded(matrix).stride(0) % 8 == 0
    assert torch.equal(padded(matrix), matrix)
