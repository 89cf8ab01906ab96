"""Lists or copies of the neurons kept: the same bits, chosen by what was measured."""

from collections.abc import Iterator
from itertools import cycle
from math import inf
from typing import Any

import pytest
import torch
from tiny import make_model, token_ids

from actsparse.engine import kept
from actsparse.engine.choose import Engines
from actsparse.engine.own import OwnRun
from actsparse.engine.step.plans import SlicedPlan
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.sites import resolve
from actsparse.results import Unit

COPYING, LISTED, COPIED = 20.0, 1.0, 0.5
EVEN = 40


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
    found = cycle([COPYING, LISTED, COPIED])
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
    laps = cycle([0.1, 1.0, 1.0])
    monkeypatch.setattr(kept, "seconds", lambda _device, work: (work(), next(laps))[1])
    run.select(10**9)
    assert run.break_even == inf
    assert "by list: copies would never be repaid" in (run.reading or "")


def test_without_memory_for_copies_lists_stay(run: OwnRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.select()
    run.use(sparse=True)
    expected = run.generate(20)

    whole, made = kept.gather, []

    def full_the_third_time(*how: Any) -> SlicedPlan:
        made.append(how)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no room")
        return whole(*how)

    monkeypatch.setattr(kept, "gather", full_the_third_time)
    for place, token in enumerate(expected[0][:-1]):
        run.step(torch.tensor([token]), 20 + place)
    run.select(100)
    assert run.generate(100)[0][:20] == expected[0]
    assert run.announced == [kept.NO_COPIES]
    assert "copie" not in (run.reading or "")
