"""sparsify: whatever drives the model, prompts run dense and decoded tokens sparse."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model, token_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from actsparse import sparsify
from actsparse.engine import stepping
from actsparse.engine.choose import Engines
from actsparse.engine.decode import greedy, new_cache, prefill
from actsparse.engine.generation import sparse_generation
from actsparse.engine.own import OwnRun
from actsparse.engine.sparse import sparse_decoder
from actsparse.errors import PlanError
from actsparse.methods.gates import Custom, LayerGates, PrefillGate, Threshold, TokenGate
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.sites import resolve
from actsparse.results import SiteKind

SINK, NEW = 4, 8
FAMILIES = ["llama", "phi3", "gpt2", "opt"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :]


def half_gates(model: PreTrainedModel) -> list[LayerGates]:
    """The stronger half of every layer's neurons on the prompt."""
    count = len(resolve(model).layers)
    gate = PrefillGate(PromptStatistic, lambda s: s >= s.median())
    return [LayerGates(neurons=gate)] * count


def test_nothing_dropped_is_the_dense_text(model: PreTrainedModel) -> None:
    ids = token_ids(1, 20)
    dense = generated(model, ids)
    with sparsify(model, "griffin@0"):
        assert torch.equal(generated(model, ids), dense)


def test_the_text_is_that_of_the_sliced_decoder(model: PreTrainedModel) -> None:
    ids = token_ids(1, 20)
    sites, gates = resolve(model), half_gates(model)
    with sparse_decoder(sites, gates, sink_tokens=SINK) as decoder:
        cache = new_cache(model, 20 + NEW)
        logits = decoder.prefill(ids, cache)
        decoder.select()
        expected = greedy(model, logits, cache, 20, NEW)
    with sparse_generation(sites, gates, sink_tokens=SINK):
        assert torch.equal(generated(model, ids), expected)
        assert torch.equal(generated(model, ids), expected), "a mask leaked into the next sequence"


def test_the_model_is_as_before_also_after_an_error(model: PreTrainedModel) -> None:
    ids = token_ids(1, 20)
    before, modules = model(input_ids=ids).logits, [id(module) for module in model.modules()]

    def fail_inside() -> None:
        with sparsify(model, "griffin@0.5"):
            generated(model, ids)
            raise KeyError("user's own")

    with pytest.raises(KeyError):
        fail_inside()
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_batch_of_two_with_left_padding_is_two_batches_of_one() -> None:
    model = make_model("llama")
    gates = half_gates(model)
    long, short = token_ids(1, 22, seed=1), token_ids(1, 15, seed=2)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, :7] = 0
    with sparse_generation(resolve(model), gates, sink_tokens=SINK):
        alone = [generated(model, long), generated(model, short)]
        both = generated(model, torch.cat([long, padded]), mask)
    assert torch.equal(both, torch.cat(alone))


def test_a_prompt_in_chunks_chooses_the_mask_of_the_whole_prompt() -> None:
    model = make_model("llama")
    ids, token = token_ids(1, 24), torch.tensor([[5]])
    found = []
    for chunks in ((24,), (10, 14), (2, 3, 19)):
        with sparse_generation(resolve(model), half_gates(model), sink_tokens=SINK), torch.no_grad():
            cache, start = DynamicCache(config=model.config), 0
            for length in chunks:
                model(input_ids=ids[:, start : start + length], past_key_values=cache)
                start += length
            found.append(model(input_ids=token, past_key_values=cache).logits)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-5, rtol=1e-4)


def test_token_gates_mask_decoded_tokens_only() -> None:
    model = make_model("llama")
    sites = resolve(model)
    gate = TokenGate(SiteKind.GATE, Custom(lambda g: torch.zeros_like(g, dtype=torch.bool)))
    nothing = [LayerGates(neurons=gate) for _ in sites.layers]
    ids = token_ids(1, 20)
    with torch.no_grad(), sparse_generation(sites, nothing, sink_tokens=SINK):
        cache = new_cache(model, 30)
        inside = prefill(model, ids, cache)
        masked_step = model(input_ids=ids[:, :1], past_key_values=cache).logits
    with torch.no_grad():
        cache = new_cache(model, 30)
        assert torch.equal(prefill(model, ids, cache), inside)
        assert not torch.allclose(model(input_ids=ids[:, :1], past_key_values=cache).logits, masked_step)


@pytest.mark.parametrize(
    ("plan", "what"),
    [("static@0.5", "must be fitted"), ("cats@0.5", "must be fitted"), ("grifin@0.5", "no method 'grifin'")],
)
def test_plans_that_need_text_are_refused(plan: str, what: str) -> None:
    with pytest.raises(PlanError, match=what), sparsify(make_model("llama"), Path(plan)):
        pass


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that our own step decodes from here on."""
    taken: list[int] = []
    whole = OwnRun.step

    def noted(self: OwnRun, tokens: Tensor, position: int) -> Tensor:
        taken.append(position)
        return whole(self, tokens, position)

    monkeypatch.setattr(OwnRun, "step", noted)
    monkeypatch.setattr("actsparse.engine.stepping._Forward._measured", lambda *_: True)  # its steps are no text
    return taken


def test_a_family_with_a_step_of_its_own_decodes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    taken = steps_taken(monkeypatch)
    with sparse_generation(resolve(model), half_gates(model), sink_tokens=SINK):
        generated(model, ids)
    assert taken == list(range(20, 20 + NEW - 1))
    taken.clear()
    plain = make_model("opt")
    with sparse_generation(resolve(plain), half_gates(plain), sink_tokens=SINK):
        generated(plain, ids)
    assert taken == []


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"output_hidden_states": True, "return_dict_in_generate": True}]
)
def test_token_gates_under_generate_are_the_masked_path(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    gates = [LayerGates(neurons=TokenGate(SiteKind.GATE, Threshold(0.3))) for _ in resolve(model).layers]

    def text() -> Tensor:
        with sparse_generation(resolve(model), gates, sink_tokens=SINK):
            found = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0, **options,
            )  # fmt: skip
        return found if isinstance(found, Tensor) else found.sequences

    taken = steps_taken(monkeypatch)
    ours = text()
    assert bool(taken) is ("output_hidden_states" not in options)
    monkeypatch.setattr("actsparse.engine.generation.own_steps", lambda *_, **__: None)
    assert torch.equal(ours, text())


def test_steps_are_made_once_and_batches_that_they_do_not_take_are_said_to_be_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made, make = make_model("llama"), [], stepping.OwnRun
    monkeypatch.setattr(stepping, "OwnRun", lambda *args, **how: made.append(make(*args, **how)) or made[-1])
    with sparse_generation(resolve(model), half_gates(model), sink_tokens=SINK):
        texts = [generated(model, token_ids(1, 20, seed=seed)) for seed in (1, 2, 1)]
        with pytest.warns(UserWarning, match="exact, and slower than dense .at batch 9: its own step takes 8"):
            generated(model, token_ids(9, 6))
    assert len(made) == 1
    assert torch.equal(texts[0], texts[2])


def test_a_cache_that_the_caller_cuts_is_followed() -> None:
    model, ids = make_model("llama"), token_ids(1, 24)
    gates = half_gates(model)
    with torch.no_grad(), sparse_generation(resolve(model), gates, sink_tokens=SINK):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :20], past_key_values=cache)
        once = model(input_ids=ids[:, 20:21], past_key_values=cache).logits
        model(input_ids=ids[:, 21:22], past_key_values=cache)
        cache.crop(-2)
        again = model(input_ids=ids[:, 20:21], past_key_values=cache).logits
    assert cache.get_seq_length() == 21
    torch.testing.assert_close(again, once)


def decoded(model: PreTrainedModel, **options: object) -> object:
    """One decoded pass after a prompt of 20 tokens."""
    ids = token_ids(1, 21)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :20], past_key_values=cache)
        return model(input_ids=ids[:, 20:], past_key_values=cache, **options)


def test_positions_that_a_caller_gives_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    taken = steps_taken(monkeypatch)
    asked = [{"position_ids": torch.tensor([[at]])} for at in (20, 27)] + [{}]
    expected = [decoded(model, **one).logits for one in asked]  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.allclose(expected[0], expected[1])
    with sparsify(model, "griffin@0"):
        for one, logits in zip(asked, expected, strict=True):
            found = decoded(model, **one).logits  # pyright: ignore[reportAttributeAccessIssue]
            torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
    assert taken == [20, 20], "the model's own forward answers for other positions alone"


def test_padding_without_positions_is_the_models_own_business(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 21)
    mask = (torch.arange(21) >= 6).long()[None]

    def logits(**options: object) -> Tensor:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            return model(input_ids=ids[:, 20:], attention_mask=mask, past_key_values=cache, **options).logits

    expected, taken = logits(), steps_taken(monkeypatch)
    assert not torch.allclose(expected, logits(position_ids=torch.tensor([[14]])))
    with sparsify(model, "griffin@0"):
        torch.testing.assert_close(logits(), expected, atol=1e-5, rtol=1e-4)
        assert taken == []
        logits(position_ids=torch.tensor([[14]]))
    assert taken == [20]


def test_an_answer_comes_in_the_shape_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    taken = steps_taken(monkeypatch)
    with sparsify(model, "griffin@0.5"):
        named = decoded(model, return_dict=True)
        assert taken == [20]
        listed = decoded(model, return_dict=False)
    assert isinstance(listed, tuple)
    torch.testing.assert_close(listed[0], named.logits, atol=1e-5, rtol=1e-4)  # pyright: ignore
    assert taken == [20]


@pytest.mark.parametrize("place", ["weights_from_model", "Translator.plan"])
def test_without_memory_for_copies_the_models_own_forward_decodes(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    sites, gates, ids = resolve(model), half_gates(model), token_ids(1, 20)

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 1 EB")

    monkeypatch.setattr(f"actsparse.engine.own_steps.{place}", full)
    with Engines(sites).open(gates, sink_tokens=SINK, max_length=40) as run:
        run.prefill(ids, watch=True)
        run.select()
        run.use(sparse=True)
        text = run.generate(NEW)
    assert run.tier > 1
    assert "no memory" in run.announced[0]
    with sparse_decoder(sites, gates, sink_tokens=SINK) as decoder:
        cache = new_cache(model, 40)
        logits = decoder.prefill(ids, cache)
        decoder.select()
        assert text == greedy(model, logits, cache, 20, NEW).tolist()


def test_other_faults_of_an_engine_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a size is wrong")

    monkeypatch.setattr("actsparse.engine.own_steps.weights_from_model", broken)
    engines = Engines(resolve(make_model("llama")))
    with pytest.raises(RuntimeError, match="size is wrong"), engines.open((), sink_tokens=SINK, max_length=40):
        pass


@pytest.mark.parametrize("cut", [0, 2])
def test_gates_that_choose_again_go_on_over_a_new_run_and_a_cut_cache(
    cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama"), token_ids(1, 8)
    given = token_ids(1, 24, seed=3)
    gate = PrefillGate(PromptStatistic, lambda s: s >= s.median(), refresh_every=3)
    sites, gates = resolve(model), [LayerGates(neurons=gate)] * len(resolve(model).layers)
    made, make = [], stepping.OwnRun
    monkeypatch.setattr(stepping, "OwnRun", lambda *args, **how: made.append(make(*args, **how)) or made[-1])
    monkeypatch.setattr(stepping, "GROWTH", 8)

    def logits() -> Tensor:
        with torch.no_grad(), sparse_generation(sites, gates, sink_tokens=SINK):
            cache, found = DynamicCache(config=model.config), []
            model(input_ids=ids, past_key_values=cache)
            for at in range(given.shape[1]):
                if cut and at == 5:
                    cache.crop(-cut)
                odd = {"output_hidden_states": True} if at == 10 else {}  # the model's own forward answers this one
                found.append(model(input_ids=given[:, at : at + 1], past_key_values=cache, **odd).logits)
        return torch.cat(found, dim=1)

    ours = logits()
    assert len(made) > 1, "the room was never used up"
    monkeypatch.setattr("actsparse.engine.generation.own_steps", lambda *_, **__: None)
    torch.testing.assert_close(ours, logits(), atol=1e-5, rtol=1e-4)


class OnAnotherDevice(Tensor):
    """Refuses to meet tensors of the CPU, but for single numbers, as those of a GPU do."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        assert not any(type(one) is Tensor and one.dim() for one in args), "tensors on two devices"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_positions_on_a_gpu_are_compared_there() -> None:
    for at in (20, 21):
        given = torch.tensor([[at]]).as_subclass(OnAnotherDevice)
        assert stepping._at_the_end(20, {"position_ids": given}, True) is (at == 20)


def said_of(messages: list[warnings.WarningMessage], words: str) -> int:
    return sum(words in str(one.message) for one in messages)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"cache_implementation": "static"}, "does not read a StaticCache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "knows no output_hidden_states"),
    ],
)
def test_each_reason_for_masks_instead_of_the_step_is_said_once(how: dict[str, object], words: str) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    with warnings.catch_warnings(record=True) as said, sparsify(model, "griffin@0.5"):
        warnings.simplefilter("always")
        for _ in range(2):
            model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0, **how,
            )  # fmt: skip
        decoded(model, position_ids=torch.tensor([[27]]))
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
    assert said_of(said, words) == said_of(said, "at the cache's end") == said_of(said, "by name") == 1
    assert said_of(said, "masks are applied") == 3


def test_what_a_run_announces_is_passed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(OwnRun, "announced", ["the operators could not be built"])
    with warnings.catch_warnings(record=True) as said, sparsify(model, "griffin@0.5"):
        warnings.simplefilter("always")
        for seed in (1, 2):
            generated(model, token_ids(1, 20, seed=seed))
    assert said_of(said, "could not be built") == 1


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    "place", ["own_steps.weights_from_model", "own_steps.Translator.plan", "own.Decoder", "own.KeptNeurons.choose"]
)
def test_without_memory_for_its_step_a_model_that_others_drive_goes_on(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    with sparse_generation(resolve(model), half_gates(model), sink_tokens=SINK):
        expected = generated(model, ids)
    monkeypatch.setattr(f"actsparse.engine.{place}", no_memory)
    with (
        warnings.catch_warnings(record=True) as said,
        sparse_generation(resolve(model), half_gates(model), sink_tokens=SINK),
    ):
        warnings.simplefilter("always")
        assert torch.equal(generated(model, ids), expected)
    assert said_of(said, "there is no memory") == 1


def test_a_text_that_outgrows_memory_goes_on_in_the_masked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 6)
    gate = PrefillGate(PromptStatistic, lambda s: s >= s.median(), refresh_every=2)
    sites, gates = resolve(model), [LayerGates(neurons=gate)] * len(resolve(model).layers)
    with sparse_generation(sites, gates, sink_tokens=SINK):
        expected = generated(model, ids)
    made, make = [], stepping.OwnRun

    def once(*args: object, **how: object) -> OwnRun:
        made.append(how["max_length"])
        if len(made) > 1:
            no_memory()
        return make(*args, **how)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(stepping, "OwnRun", once)
    monkeypatch.setattr(stepping, "GROWTH", 4)
    monkeypatch.setattr(stepping._Forward, "_measured", lambda *_: False)
    with sparse_generation(sites, gates, sink_tokens=SINK), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(generated(model, ids), expected)
    assert made == [12, 22], "a room that memory did not suffice for is asked for once"
    assert said_of(said, "there is no memory") == 1


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_fast_atomics_that_no_engine_here_has_are_said(model_type: str) -> None:
    model = make_model(model_type)
    with warnings.catch_warnings(record=True) as said, sparsify(model, "griffin@0.5", fast_atomics=True):
        warnings.simplefilter("always")
        for _ in range(2):
            generated(model, token_ids(1, 9))
    assert said_of(said, "fast atomics change nothing here") == 1
