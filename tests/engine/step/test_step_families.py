"""The decode step of every tier-1 family on CPU: logits and greedy text are transformers' own."""

import pytest
import torch
from tiny import VOCAB, make_model, token_ids

from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.packing import TIER_1, share_storage, weights_from_model
from actsparse.errors import ModelError


def longrope(switch):
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": switch,
        },
        "original_max_position_embeddings": switch,
        "max_position_embeddings": 80,
    }


SPECIAL_CASES = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": (
        "llama",
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
    "llama, dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 24,
        },
    ),
    "mistral, window": ("mistral", {"sliding_window": 10}),
    "qwen2, window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "smollm3, without rotation in some layers": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite, multipliers": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "gemma2, window and caps": (
        "gemma2",
        {
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 7,
        },
    ),
    "gemma3, windows and two rope bases": (
        "gemma3_text",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3, part of a head rotates": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3, longrope, short": ("phi3", longrope(40)),
    "phi3, longrope, long": ("phi3", longrope(8)),
    "phi3, longrope, passed": ("phi3", longrope(20)),
}
CASES = {name: (name, {}) for name in TIER_1} | SPECIAL_CASES
PROMPT, NEW = 14, 12


def tiny(case, dtype=torch.float64):
    model_type, changes = CASES[case]
    return make_model(model_type, **changes).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_teacher_forced_logits_are_the_models(case):
    model = tiny(case)
    ids = token_ids(1, PROMPT + NEW)
    # The reference decodes with a cache too, so that tables that depend on the length are those of each step. Even in
    # float64 its norms and softmax are float32.
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    decoder = Decoder.from_model(model, max_length=PROMPT + NEW + 1)
    decoder.load_prefill(cache, ids[:, PROMPT])
    decoder.force(ids[:, PROMPT + 1 :])
    for at in range(PROMPT, PROMPT + NEW):
        want = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        assert decoder.decode(1).shape == (1, 1)
        torch.testing.assert_close(decoder.state.logits, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("passed")])
def test_greedy_text_equals_generate(case):
    model = tiny(case)
    ids = token_ids(1, PROMPT, seed=3)
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[:, PROMPT + 1 :]
    out = model(ids, use_cache=True)
    decoder = Decoder.from_model(model, max_length=PROMPT + NEW + 1)
    decoder.load_prefill(out.past_key_values, out.logits[:, -1].argmax(-1))
    assert torch.equal(decoder.decode(NEW - 1), want)


@torch.no_grad()
def test_passing_a_rope_switch_is_announced():
    # There `generate` computes the whole cache anew.
    for switch, said in ((40, False), (8, False), (20, True)):
        model = make_model("phi3", **longrope(switch))
        decoder = Decoder.from_model(model, max_length=PROMPT + NEW + 1)
        decoder.load_prefill(model(token_ids(1, PROMPT), use_cache=True).past_key_values, torch.tensor([5]))
        assert any("rotary" in warning for warning in decoder.warnings) is said


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gemma3, windows and two rope bases", "phi3"])
def test_a_batch_of_unequal_prompts_equals_each_alone(case):
    model = tiny(case)
    lengths, longest = (14, 9, 5), 14
    prompts = [token_ids(1, length, seed=length) for length in lengths]
    padding = torch.tensor([longest - length for length in lengths])
    ids = torch.cat([torch.nn.functional.pad(one, (longest - one.shape[1], 0), value=3) for one in prompts])
    mask = torch.arange(longest) >= padding[:, None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask.long(), position_ids=positions, use_cache=True)
    decoder = Decoder.from_model(model, max_length=longest + NEW + 1, batch=3)
    decoder.load_prefill(out.past_key_values, out.logits[:, -1].argmax(-1), padding)
    together = decoder.decode(NEW)
    for one, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=NEW + 1, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(together[one], alone[0, prompt.shape[1] + 1 :])


@torch.no_grad()
@pytest.mark.parametrize("model_type", TIER_1)
def test_sharing_storage_changes_no_logit(model_type):
    model = make_model(model_type)
    ids = token_ids(1, 7)
    before = model(ids).logits
    weights = weights_from_model(model)
    share_storage(model, weights)
    assert torch.equal(model(ids).logits, before)
    assert model.model.layers[1].mlp.down_proj.weight.data_ptr() == weights.down[1].data_ptr()


def test_what_the_step_does_not_compute_is_refused():
    with pytest.raises(ModelError, match="no step of its own"):
        weights_from_model(make_model("gpt2"))
    with pytest.raises(ModelError, match="activation"):
        weights_from_model(make_model("llama", hidden_act="tanh"))


def test_half_precision_weights_stay_as_they_are():
    model = make_model("llama").bfloat16()
    weights = weights_from_model(model)
    assert weights.dtype is torch.bfloat16
    assert weights.attn_norm.dtype is torch.float32
    assert weights.embedding.shape == (VOCAB, 32)
