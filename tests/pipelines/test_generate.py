"""`generate`: text by the fastest engine, which says when a plan does not pay and then decodes dense."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tiny import make_model, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from actsparse import generate, sparsify
from actsparse.engine import timing
from actsparse.engine.choose import Engines
from actsparse.errors import ActsparseError, PlanError
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.sites import resolve

NEW = 10
PLAN = "griffin@0.5"


def probed(monkeypatch: pytest.MonkeyPatch, speedup: float, best: float | None = None) -> None:
    """Let every probe find this speed-up, and this best pair, after it ran."""
    whole = timing.probe_of

    def fixed(model: PreTrainedModel, decode: object, *, tokens: int, ready: object) -> timing.Probe:
        whole(model, decode, tokens=tokens, ready=ready)  # pyright: ignore[reportArgumentType]
        return timing.Probe(dense_ms=1.0, sparse_ms=1 / speedup, speedup=speedup, best=best or speedup)

    monkeypatch.setattr(timing, "probe_of", fixed)


def by_transformers(model: PreTrainedModel, ids: Tensor) -> list[int]:
    found = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
        pad_token_id=0,
    )  # fmt: skip
    return found[0, ids.shape[1] :].tolist()


def test_a_plan_that_pays_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    probed(monkeypatch, 1.5)
    found = generate(model, PLAN, ids, max_new_tokens=NEW, stop=frozenset())
    with sparsify(model, PLAN):
        assert list(found.tokens[0]) == by_transformers(model, ids)
    assert found.decode == "sparse"
    assert found.probe is not None
    assert found.warnings == ()
    assert "own step" in found.engine


def test_a_plan_that_does_not_pay_decodes_dense_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    dense = by_transformers(model, ids)
    with sparsify(model, PLAN):
        sparse = by_transformers(model, ids)
    assert sparse != dense
    probed(monkeypatch, 0.5)
    found = generate(model, PLAN, ids, max_new_tokens=NEW, stop=frozenset())
    assert (found.decode, list(found.tokens[0])) == ("dense", dense)
    assert "does not pay" in found.warnings[-1]
    kept = generate(model, PLAN, ids, max_new_tokens=NEW, stop=frozenset(), when_slower="sparse")
    assert (kept.decode, list(kept.tokens[0])) == ("sparse", sparse)
    assert "decode goes on sparse" in kept.warnings[-1]


def test_a_clock_that_is_not_sure_does_not_choose_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    with sparsify(model, PLAN):
        sparse = by_transformers(model, ids)
    probed(monkeypatch, 0.98, best=1.03)
    found = generate(model, PLAN, ids, max_new_tokens=NEW, stop=frozenset(), when_slower="dense")
    assert (found.decode, list(found.tokens[0])) == ("sparse", sparse)
    assert "not clearly faster or slower" in found.warnings[-1]
    with pytest.warns(UserWarning, match="decode goes on sparse"), sparsify(model, PLAN, when_slower="dense"):
        assert by_transformers(model, ids) == sparse


@pytest.mark.parametrize("plan", [PLAN, "griffin:refresh_every=3@0.5"])
def test_sparsify_measures_once_and_warns(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama"), token_ids(1, 20)
    dense = by_transformers(model, ids)
    with sparsify(model, plan):
        sparse = by_transformers(model, ids)
    probed(monkeypatch, 0.5)

    def twice() -> list[list[int]]:
        with sparsify(model, plan):
            return [by_transformers(model, ids) for _ in range(2)]

    with pytest.warns(UserWarning, match="does not pay at batch 1") as said:
        assert twice() == [sparse, sparse]
    assert len([one for one in said if "does not pay" in str(one.message)]) == 1
    with pytest.warns(UserWarning, match="goes on dense"), sparsify(model, plan, when_slower="dense"):
        assert by_transformers(model, ids) == dense


def test_a_seed_gives_the_same_text_and_stop_tokens_end_it() -> None:
    model, ids = make_model("llama"), token_ids(2, 20)

    def drawn(seed: int, stop: frozenset[int] = frozenset()) -> tuple[tuple[int, ...], ...]:
        return generate(
            model, PLAN, ids, max_new_tokens=NEW, temperature=1.5, top_p=0.95, seed=seed, stop=stop,
            when_slower="sparse",
        ).tokens  # fmt: skip

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first
    stopped = drawn(1, frozenset({first[0][3]}))
    assert stopped[0] == first[0][: first[0].index(first[0][3]) + 1]


def test_padding_in_front_changes_nothing() -> None:
    model, short = make_model("llama"), token_ids(1, 15, seed=2)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    mask = (torch.arange(20) >= 5).long()[None]
    alone, both = (
        generate(model, PLAN, ids, attention_mask=m, max_new_tokens=NEW, stop=frozenset(), when_slower="sparse").tokens
        for ids, m in ((short, None), (padded, mask))
    )
    assert alone == both


def test_what_no_engine_runs_is_dense_or_masked() -> None:
    model, ids = make_model("gpt2"), token_ids(1, 20)
    plan = "griffin:refresh_every=3@0.5"
    found = generate(model, plan, ids, max_new_tokens=NEW, stop=frozenset())
    assert (found.decode, found.probe) == ("dense", None)
    assert list(found.tokens[0]) == by_transformers(model, ids)
    assert "no engine" in found.warnings[-1]
    masked = generate(model, plan, ids, max_new_tokens=NEW, stop=frozenset(), when_slower="sparse")
    with pytest.warns(UserWarning, match="slower than dense"), sparsify(model, plan):
        assert list(masked.tokens[0]) == by_transformers(model, ids)
    with pytest.raises(PlanError, match="no engine"):
        generate(model, plan, token_ids(2, 20), max_new_tokens=NEW)


@pytest.mark.parametrize("own", [True, False], ids=["own step", "model's forward"])
def test_a_lap_of_the_probe_is_decode_alone_and_leaves_no_trace(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("llama" if own else "gpt2"), token_ids(1, 20)
    every = 2 if own else None  # the probe's second token is a dense one
    gate = PrefillGate(PromptStatistic, lambda s: s >= s.median(), refresh_every=every)
    gates = [LayerGates(neurons=gate)] * len(resolve(model).layers)
    done: list[str] = []
    timed = timing.elapsed

    def lap(model: PreTrainedModel, work: Callable[[], object]) -> float:
        done.append("start")
        seconds = timed(model, work)
        done.append("stop")
        return seconds

    def noted(kind: type, name: str) -> None:
        whole = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, **how: (done.append(name), whole(*args, **how))[1])

    with Engines(resolve(model)).open(gates, sink_tokens=4, max_length=40) as run:
        run.prefill(ids, watch=True)
        run.select()
        run.use(sparse=True)
        expected = run.generate(NEW)
        run.rewind()
        monkeypatch.setattr(timing, "elapsed", lap)
        for name in ("rewind", "select"):
            noted(type(run), name)
        timing.probe(run, model)
        assert done.count("start") == 2 * (timing.PROBE_PAIRS + 1)
        assert {"rewind", "select"} >= set(done) - {"start", "stop"} >= {"rewind"}
        assert all(after == "stop" for one, after in pairwise(done) if one == "start")
        run.use(sparse=True)
        assert run.generate(NEW) == expected


def test_the_probe_tells_the_faster_arm() -> None:
    def decode(sparse: bool) -> None:
        work = torch.randn(400, 400)
        for _ in range(1 if sparse else 12):
            work = work @ work / 20

    found = timing.probe_of(make_model("llama"), decode, tokens=2)
    assert found.pays
    assert found.sparse_ms < found.dense_ms
    assert found.best >= found.speedup
    assert not found.slower
    even = timing.Probe(dense_ms=1.0, sparse_ms=1.0, speedup=1.0, best=1.0)
    assert (even.pays, even.slower) == (False, False)
    assert timing.probe_of(make_model("llama"), lambda sparse: decode(not sparse), tokens=2).slower


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": 5}, "a plan is a short form or a directory, and no int"),
        ({"plan": None}, "and no NoneType"),
        ({"model": 5}, "sparsify takes a loaded model of transformers, and no int"),
        ({"model": torch.nn.Linear(2, 2)}, "and no Linear"),
        ({"sink_tokens": -1}, "sink_tokens must be at least 0"),
        ({"when_slower": "fast"}, "when_slower cannot be 'fast'"),
    ],
)
def test_what_sparsify_does_not_take_is_said(given: dict, said: str) -> None:
    asked = {"model": make_model("llama"), "plan": PLAN} | given
    with pytest.raises(ActsparseError, match=said) as refused, sparsify(**asked):
        pytest.fail("nothing may run")
    assert refused.value.hint
