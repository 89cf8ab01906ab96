"""Whole steps on the GPU: against the torch step stage by stage, against transformers, and against themselves."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actsparse.engine.cuda.engine import cuda_decoder, decoder_of
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.step import reference, sliced
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, InputScores, NeuronPlan, column_norms
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.sampling import draw as draw_token
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.state import set_hidden
from actsparse.engine.step.torch_step import TorchStep
from actsparse.engine.step.weights import input_rows, random_weights, transpose_rows

pytestmark = pytest.mark.gpu

GROUPED = Shape(
    name="grouped", layers=2, width=896, neurons=1400, heads=14, kv_heads=2, head_dim=64, vocab=1003, qkv_bias=True
)
GEMMA = Shape(
    name="gemma",
    layers=2,
    width=640,
    neurons=1400,
    heads=4,
    kv_heads=1,
    head_dim=256,
    vocab=1003,
    activation="gelu_tanh",
    tied=True,
    qk_norm=True,
    post_norm=True,
    attention_scale=0.08,
    attention_softcap=4.0,
    logit_softcap=3.0,
    embed_scale=25.25,
    residual_scale=0.7,
    logit_scale=0.5,
    windows=(32, None),
)
FULL = Shape(name="full", layers=2, width=1024, neurons=2752, heads=8, kv_heads=8, head_dim=128, vocab=2000)
PLANS = ("dense", "sliced", "indexed", "cats", "chess", "countdown", "teal", "wina", "teal atomics")


SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "gemma": {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 128, "query_pre_attn_scalar": 100, "sliding_window": 24},
    "gemma3_text": {
        "head_dim": 128,
        "query_pre_attn_scalar": 100,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"hidden_size": 768, "num_key_value_heads": 8},
}


def family_model(kind):
    config = AutoConfig.for_model(kind, **(SIZES | FAMILIES[kind]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide their absence
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_plan(kind, weights):
    shape = weights.shape
    down_rows = transpose_rows(weights.down)
    scores = torch.rand(shape.layers, shape.neurons, device=weights.device)
    match kind:
        case "dense":
            return DensePlan()
        case "sliced":
            plan = sliced.empty_plan(weights, sliced.capacity_for(shape.neurons // 2))
            sliced.select_top(plan.selection, scores, shape.neurons // 2)
            sliced.fill(plan, weights, down_rows, None)
            return plan
        case "indexed":
            selection = sliced.empty_selection(weights, sliced.capacity_for(shape.neurons))
            sliced.select_threshold(selection, scores, scores.quantile(0.5, dim=1))
            return IndexedPlan(down_rows=down_rows, selection=selection)
        case "cats":
            return NeuronPlan(threshold=torch.full((shape.layers, 1), 0.2, device="cuda"), down_rows=down_rows)
        case "chess":
            return NeuronPlan(threshold=0.4 * scores, down_rows=down_rows)
        case "countdown":
            threshold = torch.full((shape.layers, 1), 0.6, device="cuda")
            return NeuronPlan(threshold=threshold, down_rows=down_rows, first="up")
        case _:
            norms = None
            if kind == "wina":
                widths = (shape.query_width, shape.kv_width, shape.kv_width)
                norms = InputScores(
                    qkv=column_norms(weights.qkv, widths),
                    out=column_norms(weights.out, (shape.width,)),
                    gate_up=column_norms(weights.gate_up, (shape.neurons, shape.neurons)),
                    down=column_norms(weights.down, (shape.width,)),
                )
            threshold = torch.tensor([0.5, 0.6, 0.7, 0.05, 0.5, 0.6, 0.1], device="cuda").expand(shape.layers, 7)
            return InputPlan(
                weights=input_rows(weights, down_rows),
                threshold=threshold.contiguous(),
                scores=norms,
                fast_atomics=kind == "teal atomics",
            )


def assert_products(stage, native, weights, state, plan, layer, hidden, assert_near):
    """Every product of the stage on the inputs that it had, since rounding moves entries across thresholds."""
    shape, scores = weights.shape, plan.scores

    def product(rows, x, at, score):
        return reference.input_sparse(rows.double(), x.double(), plan.threshold[layer, at], score)

    def parts(rows, widths, x, at, score):
        pieces = enumerate(rows.split(widths, dim=1))
        return torch.cat([product(p, x, at + i, None if score is None else score[layer, i]) for i, p in pieces], dim=1)

    def branch(found, post_norm):
        found = reference.rms_norm(found, post_norm[layer], shape.norm_epsilon) if shape.post_norm else found
        return found * shape.residual_scale

    if stage == "attention":
        x = reference.rms_norm(hidden, weights.attn_norm[layer], shape.norm_epsilon)
        widths = shape.qkv_widths
        want = parts(plan.weights.qkv[layer], widths, x, 0, scores and scores.qkv)
        assert_near(native.qkv, want if weights.qkv_bias is None else want + weights.qkv_bias[layer])
        cache = state.keys[layer].clone(), state.values[layer].clone()
        how = weights.layer(layer).attention
        assert_near(state.mix, reference.attend(native.qkv, *cache, state.position, *state.angles[layer], how))
        want = product(plan.weights.out[layer], state.mix, 3, scores.out[layer, 0] if scores else None)
        want = branch(want, weights.post_attn_norm)
    else:
        x = reference.rms_norm(hidden, weights.mlp_norm[layer], shape.norm_epsilon)
        widths = (shape.neurons, shape.neurons)
        assert_near(native.halves, parts(plan.weights.gate_up[layer], widths, x, 4, scores and scores.gate_up))
        gate, up = native.halves.chunk(2, dim=1)
        neurons = reference.activate(gate, shape.activation) * up
        want = product(plan.weights.down[layer], neurons, 6, scores.down[layer, 0] if scores else None)
        want = branch(want, weights.post_mlp_norm)
    assert_near(native.hidden - hidden, want)
    if shape.post_norm:
        assert_near(state.squares[0], state.hidden.square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [GROUPED, FULL, GEMMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", PLANS)
def test_every_stage_equals_the_torch_step(draw, assert_near, kind, shape, dtype):
    weights = random_weights(shape, dtype=dtype, device="cuda")
    decoder = decoder_of(weights, max_length=96)
    assert not decoder.warnings
    state, plan = decoder.state, make_plan(kind, weights)
    native = native_step(weights, state, plan, decoder.engine.operators)
    plain = TorchStep(weights, state, plan)
    state.keys.copy_(draw(*state.keys.shape))
    state.values.copy_(draw(*state.values.shape))
    state.position.fill_(70)
    for layer in range(shape.layers):
        for name in ("attention", "mlp"):
            hidden = draw(1, shape.width)
            for buffer in (state.qkv, state.mix, state.branch, state.halves, state.neurons):
                buffer.fill_(torch.nan)
            want = getattr(plain, name)(layer, hidden.clone()) - hidden
            set_hidden(state, hidden)
            native.begin()
            getattr(native, name)(layer)
            if isinstance(plan, InputPlan):
                assert_products(name, native, weights, state, plan, layer, hidden, assert_near)
            else:
                assert_near(native.hidden - hidden, want)
    hidden = draw(1, shape.width)

    def finish(step):
        set_hidden(state, hidden)
        state.position.fill_(70)
        state.logits.fill_(torch.nan)
        step()
        assert state.position.item() == 71
        return state.logits.clone(), state.tokens[0, 71].clone()

    want_logits, want_token = finish(lambda: plain.next_token(hidden))
    logits, token = finish(lambda: (native.begin(), native.logits(), native.token()))
    assert_near(logits, want_logits)
    assert token == want_token
    assert torch.equal(state.hidden[0], weights.embedding[token].float() * shape.embed_scale)


@pytest.mark.parametrize("kind", PLANS[:-1])
def test_replays_equal_eager_bit_for_bit(kind):
    weights = random_weights(GROUPED, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=96)
    plan = make_plan(kind, weights)
    decoder.set_plan(plan)
    assert decoder.path == "graph", decoder.warnings
    runs = []
    for _ in range(2):
        decoder.start(5, 0)
        tokens = decoder.decode(40)
        runs.append((tokens, decoder.state.logits.clone(), decoder.state.keys.clone()))
    decoder.start(5, 0)
    eager = native_step(weights, decoder.state, plan, decoder.engine.operators)
    for _ in range(40):
        eager()
    runs.append((decoder.state.tokens[:, 1:41], decoder.state.logits, decoder.state.keys))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_a_refilled_buffer_is_seen_by_the_captured_step():
    weights = random_weights(GROUPED, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=64)
    down_rows = transpose_rows(weights.down)
    plan = sliced.empty_plan(weights, sliced.capacity_for(700))
    decoder.set_plan(plan)
    eager = native_step(weights, decoder.state, plan, decoder.engine.operators)
    results = []
    for keep in (700, 650, 333):
        scores = torch.rand(2, GROUPED.neurons, device="cuda")
        sliced.select_top(plan.selection, scores, keep)
        sliced.fill(plan, weights, down_rows, decoder.engine.operators)
        copy = dataclasses.replace(plan, gate_up=plan.gate_up.clone(), down=plan.down.clone())
        sliced.fill(copy, weights, down_rows, None)
        assert torch.equal(copy.gate_up, plan.gate_up)
        assert torch.equal(copy.down, plan.down)
        assert (plan.down[:, keep:] == 0).all()
        decoder.start(3, 0)
        decoder.decode(20)
        replayed = decoder.state.logits.clone()
        decoder.start(3, 0)
        for _ in range(20):
            eager()
        assert torch.equal(replayed, decoder.state.logits)
        results.append(replayed)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prefill_of_transformers_is_continued(kind, assert_near):
    model = family_model(kind).to("cuda", torch.bfloat16)
    decoder = cuda_decoder(model, max_length=128)
    assert not decoder.warnings
    exact = model.float()
    ids = torch.randint(0, 1000, (1, 50), device="cuda")
    with torch.no_grad():
        decoder.load_prefill(exact(ids[:, :40], use_cache=True).past_key_values, ids[:, 40])
        decoder.force(ids[:, 41:])
        for position in range(40, 49):
            decoder.decode(1)
            want = exact(ids[:, : position + 1], use_cache=False).logits[:, -1]
            # The decoder's cache is bfloat16, the reference's float32.
            assert_near(decoder.state.logits, want, limit=1e-2)


def test_sampling_is_the_references(assert_near):
    weights = random_weights(GROUPED, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=64)
    texts = []
    for seed in (5, 5, 6):
        decoder.sample(Sampling(temperature=0.8, top_p=0.9, seed=seed))
        decoder.start(3, 0)
        texts.append(decoder.decode(40))
    assert decoder.path == "graph"
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    uniform = Sampling(seed=6).uniform(1, 64).to("cuda")
    decoder.sample(Sampling(temperature=0.8, top_p=0.9, seed=6))
    decoder.start(3, 0)
    for at in range(20):
        token = decoder.decode(1)[0, 0]
        temperature, top_p = decoder.state.temperature, decoder.state.top_p
        assert token == draw_token(decoder.state.logits, uniform[:, at + 1], temperature, top_p)[0]


def test_greedy_text_equals_generate_in_float32():
    model = family_model("qwen2").float().to("cuda")
    decoder = cuda_decoder(model, max_length=128)
    ids = torch.randint(0, 1000, (1, 20), device="cuda")
    with torch.no_grad():
        prefill = model(ids, use_cache=True)
        decoder.load_prefill(prefill.past_key_values, prefill.logits[:, -1].argmax(-1))
        want = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 21:]
    assert torch.equal(decoder.decode(24), want)
    assert decoder.path == "graph", decoder.warnings
    assert any("torch.compile" in warning for warning in decoder.warnings)


def test_a_batch_equals_each_alone_in_float32():
    model = family_model("llama").float().to("cuda")
    ids = torch.randint(0, 1000, (3, 20), device="cuda")
    with torch.no_grad():
        prefill = model(ids, use_cache=True)
        decoder = cuda_decoder(model, max_length=64, batch=3)
        decoder.load_prefill(prefill.past_key_values, prefill.logits[:, -1].argmax(-1))
        want = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 21:]
    assert torch.equal(decoder.decode(24), want)


def test_padding_in_front_of_one_prompt_is_not_seen(assert_near):
    model = family_model("llama").to("cuda", torch.bfloat16)
    ids, pad = torch.randint(0, 1000, (1, 20), device="cuda"), 7
    found = []
    for ahead in (0, pad):
        decoder = cuda_decoder(model, max_length=64)
        padded = torch.cat([torch.zeros(1, ahead, dtype=torch.long, device="cuda"), ids], dim=1)
        seen = (torch.arange(20 + ahead, device="cuda") >= ahead).long()[None]
        places = (seen.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            prefill = model(padded, attention_mask=seen, position_ids=places, use_cache=True)
        decoder.load_prefill(prefill.past_key_values, ids[:, -1], torch.tensor([ahead], device="cuda"))
        decoder.force(torch.arange(5, device="cuda"))
        decoder.decode(5)
        found.append(decoder.state.logits.clone())
        assert decoder.warnings == []
    assert_near(found[1], found[0], limit=2e-2)
