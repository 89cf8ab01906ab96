"""Lists or copies of the neurons kept: the same bits, chosen by what was measured."""

import gc
from collections.abc import Iterator
from itertools import cycle
from math import inf
from typing import Any, cast

import pytest
import torch
from tiny import make_model, token_ids

from actsparse.engine import kept, stepping
from actsparse.engine.choose import Engines
from actsparse.engine.generation import sparse_generation
from actsparse.engine.kept import KeptNeurons
from actsparse.engine.own import OwnRun
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.plans import SlicedPlan
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.translate import Translator
from actsparse.methods.gates import FixedGate, LayerGates, PrefillGate, Threshold, TokenGate
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.sites import resolve
from actsparse.pipelines.generate import generate
from actsparse.results import SiteKind, Unit

COPYING, LISTED, COPIED = 20.0, 1.0, 0.5
EVEN = 40
LAPS = [COPYING, *[LISTED, COPIED] * (kept.PAIRS + 1)]


@pytest.fixture
def run() -> Iterator[OwnRun]:
    model = make_model("llama")
    gates = [LayerGates(neurons=PrefillGate(PromptStatistic, lambda s: s >= s.median()))] * 2
    with Engines(resolve(model)).open(gates, sink_tokens=4, max_length=200) as one:
        assert isinstance(one, OwnRun)
        one.prefill(token_ids(1, 20), watch=True)
        yield one


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying takes as long as 40 tokens gain by it."""
    found = cycle(LAPS)
    monkeypatch.setattr(kept, "seconds", lambda _device, work: (work(), next(found))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
@pytest.mark.usefixtures("clock")
def test_copies_give_the_bits_of_lists(model_type: str, dtype: torch.dtype) -> None:
    changes = {"mlp_bias": True, "intermediate_size": 1100} if model_type == "llama" else {}  # pieces of a product
    model = make_model(model_type, **changes).to(dtype)
    gates = [LayerGates(neurons=PrefillGate(PromptStatistic, lambda s: s >= s.quantile(0.3)))] * 2
    ids, tokens = token_ids(1, 20), token_ids(1, 30)
    with Engines(resolve(model)).open(gates, sink_tokens=4, max_length=200) as run:
        run.prefill(ids, watch=True)
        run.use(sparse=True)
        found = []
        for count, told in ((8, ""), (EVEN + 1, "copied")):
            run.select(count)
            assert told in (run.reading or "")
            found.append(run.forced(tokens))
        assert torch.equal(*found)
        run.use(sparse=False)
        assert not torch.equal(found[0], run.forced(tokens))


@pytest.mark.parametrize(("tokens", "how"), [(EVEN, "by list"), (EVEN + 1, "copied")])
@pytest.mark.usefixtures("clock")
def test_copies_are_made_where_the_tokens_to_come_repay_them(run: OwnRun, tokens: int, how: str) -> None:
    assert run.break_even is None
    run.select(tokens)
    assert run.break_even == EVEN
    assert f"kept neurons {how}: copies are repaid after {EVEN} tokens" in (run.reading or "")
    run.use(sparse=True)
    run.forget()
    run.rewind()
    run.feed(token_ids(1, 5))
    neurons = make_model("llama").config.intermediate_size
    half = (neurons // 2 + 1) / neurons  # of an even number the lower median is kept
    assert run.kept() == {(Unit.NEURON.value, layer): half for layer in (0, 1)}


def test_few_tokens_are_not_worth_a_measurement(run: OwnRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> float:
        raise AssertionError("it was measured")

    monkeypatch.setattr(kept, "seconds", never)
    run.select(kept.FEWEST - 1)
    run.select()
    assert run.break_even is None


@pytest.mark.usefixtures("clock")
def test_a_prompt_of_other_size_is_copied_anew(run: OwnRun) -> None:
    run.use(sparse=True)
    texts = {}
    for seed in (1, 2, 1):
        run.prefill(token_ids(1, 20, seed=seed), watch=True)
        run.select(EVEN + 1)
        copied = run.generate(12)
        assert "copied" in (run.reading or "")
        run.select()
        assert run.generate(12) == copied
        assert texts.setdefault(seed, copied) == copied
    assert texts[1] != texts[2]


@pytest.mark.usefixtures("clock")
def test_tokens_that_nobody_announced_are_copied_for_once_they_are_many(run: OwnRun) -> None:
    run.select()
    run.use(sparse=True)
    stream = token_ids(1, 60)[0].split(1)
    found, ways = [], []
    for place, token in enumerate(stream):
        found.append(run.step(token, 20 + place).clone())
        ways.append((run.reading or "").split("kept neurons ")[-1].split(":")[0])
    assert [way == "copied" for way in ways] == [place >= EVEN for place in range(60)]
    run.select()
    assert torch.equal(torch.stack(found, dim=1), run.forced(token_ids(1, 60)))


@pytest.mark.usefixtures("clock")
def test_measuring_leaves_no_trace(run: OwnRun) -> None:
    run.select()
    run.use(sparse=True)
    expected = run.generate(20)
    assert run.break_even is None
    run.select(EVEN)
    assert run.generate(20) == expected
    run.use(sparse=False)
    dense = run.generate(20)
    run.select(EVEN + 1)
    assert run.generate(20) == dense, "choosing copies changed the dense arm"


def test_copies_that_save_nothing_are_never_made(run: OwnRun, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = cycle([1.0])
    monkeypatch.setattr(kept, "seconds", lambda _device, work: (work(), next(laps))[1])
    run.select(10**9)
    assert run.break_even == inf
    assert "by list: copies would never be repaid" in (run.reading or "")


def test_without_memory_for_copies_lists_stay(run: OwnRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.select()
    run.use(sparse=True)
    expected = run.generate(20)

    whole, made = kept.gather, []

    def full_the_second_time(*how: Any) -> None:
        made.append(1)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no room")
        whole(*how)

    monkeypatch.setattr(kept, "gather", full_the_second_time)
    for place, token in enumerate(expected[0][:-1]):
        run.step(torch.tensor([token]), 20 + place)
    run.select(100)
    assert run.generate(100)[0][:20] == expected[0]
    assert run.announced == [kept.LISTS_STAY]
    assert run.reading is None
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is SlicedPlan], "the copies are still held"


@pytest.mark.usefixtures("clock")
def test_copies_of_masks_that_hold_for_every_prompt_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    mask = torch.arange(model.config.intermediate_size) % 2 == 0
    made, whole = [], kept.gather
    monkeypatch.setattr(kept, "gather", lambda *how: (made.append(1), whole(*how)))
    with Engines(resolve(model)).open([LayerGates(neurons=FixedGate(mask))] * 2, sink_tokens=4, max_length=200) as run:
        run.prefill(token_ids(1, 20), watch=True)
        run.select(EVEN + 1)
        run.use(sparse=True)
        first, copied = run.generate(9), len(made)
        for seed in (1, 0):
            run.prefill(token_ids(1, 20, seed=seed), watch=True)
            run.select(EVEN + 1)
            again = run.generate(9)
        assert again == first
        assert len(made) == copied


@pytest.mark.usefixtures("clock")
def test_a_text_that_outgrows_its_room_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 10)
    gates = [LayerGates(neurons=PrefillGate(PromptStatistic, lambda s: s >= s.median()))] * 2
    measured, whole = [], kept.KeptNeurons._measured
    monkeypatch.setattr(kept.KeptNeurons, "_measured", lambda *how: (measured.append(1), whole(*how))[1])
    monkeypatch.setattr(stepping, "GROWTH", 50)
    copied: list[bool] = []
    step = OwnRun.step
    monkeypatch.setattr(
        OwnRun, "step", lambda self, *how: (step(self, *how), copied.append("copied" in (self.reading or "")))[0]
    )

    def text() -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=130,
                              max_new_tokens=130, pad_token_id=0)  # pyright: ignore[reportCallIssue] # fmt: skip

    with sparse_generation(resolve(model), gates, sink_tokens=2):
        found = text()
    assert measured == [1]
    assert copied[-1], copied
    assert all(copied[len(copied) - 129 + EVEN :]), "a new room waited for the break-even once more"
    monkeypatch.setattr(kept, "FEWEST", 10**9)
    with sparse_generation(resolve(model), gates, sink_tokens=2):
        assert torch.equal(text(), found)


@pytest.mark.usefixtures("clock")
def test_counts_are_those_of_every_step_of_a_plan() -> None:
    model = make_model("llama")
    gate = TokenGate(SiteKind.GATE, Threshold(0.3))
    with Engines(resolve(model)).open([LayerGates(neurons=gate)] * 2, sink_tokens=4, max_length=100, batch=2) as run:
        found = []
        for padding in (None, torch.tensor([3, 0]), None):
            run.prefill(token_ids(2, 20), watch=True, padding=padding)
            run.select()
            run.use(sparse=True)
            run.forget()
            run.generate(9, sampling=Sampling(temperature=1.0, seed=1) if padding is not None else None)
            found.append(run.kept())
        assert found[0] == found[2]
        assert all(0 < share <= 1 for shares in found for share in shares.values())


def test_the_probe_times_what_decodes_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    select = OwnRun.select
    monkeypatch.setattr(OwnRun, "select", lambda self, tokens=None: (asked.append(tokens), select(self, tokens))[1])
    generate(make_model("llama"), "griffin@0.5", token_ids(1, 20), max_new_tokens=70)
    assert asked[0] == 70


class Preset:
    """The state of gates that have chosen already."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.gate = PrefillGate(PromptStatistic, lambda s: s > 0)
        self.ready = True
        self._mask = mask

    def chosen(self) -> torch.Tensor:
        return self._mask


def test_a_batch_that_keeps_nearly_all_reads_everything_in_place_and_says_so_once() -> None:
    weights = weights_from_model(make_model("llama"))
    neurons, layers, gate = weights.shape.neurons, weights.shape.layers, PrefillGate(PromptStatistic, lambda s: s > 0)
    translator = Translator(weights)
    plan = translator.plan([LayerGates(neurons=gate)] * layers, 2)
    one = KeptNeurons(plan, translator, Decoder(weights, max_length=20, batch=2), chooses_again=True)
    one._unites = True  # as on a GPU

    def keep(share: float, seed: int, *, again: bool) -> SlicedPlan:
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(neurons, generator=generator).argsort()
        half = order < share * neurons / 2
        masks = torch.stack([half, (order >= neurons - share * neurons / 2)])
        one.choose(cast(Any, [Preset(masks)] * layers), again=again)
        assert isinstance(one.work, SlicedPlan)
        assert one.work.mask is not None
        found = torch.zeros(2, neurons)
        for row in (0, 1):
            found[row, one.work.selection.index[0][one.work.mask[0, row] > 0].long()] = 1
        assert torch.equal(found > 0, masks)
        return one.work

    first = keep(0.5, 1, again=False)
    assert one.shares() == pytest.approx([0.5] * layers, abs=0.05)
    assert keep(0.2, 2, again=True) is first, "a refresh in the middle of a text made another step ready"
    assert keep(0.2, 3, again=False).down.shape[1] < first.down.shape[1]
    assert one.warnings == []
    every = keep(1.0, 4, again=True)
    assert every.gate_up is weights.gate_up
    assert one.shares() == [1.0] * layers
    assert keep(1.0, 5, again=True) is every
    assert one.warnings == [kept.NO_GAIN]
