"""Every method of the registry in the engine that is chosen for it: the logits of the masked path, token by token."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import make_tokenizer, token_ids, words
from torch import Tensor
from transformers import DynamicCache

from actsparse.data.sequences import blocks_of
from actsparse.engine.choose import Engines, tier_of
from actsparse.engine.cuda.fold import fold
from actsparse.engine.decode import forced, new_cache, prefill
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.engine.own import OwnRun
from actsparse.engine.own_steps import OwnSteps
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan
from actsparse.engine.step.sampling import Sampling
from actsparse.errors import PlanError
from actsparse.methods.gates import ChannelGate, ChannelRule, LayerGates, Threshold, TokenGate, TopK
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.registry import all_methods
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import resolve
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import SiteKind, Unit

PROMPT, BLOCK, SINK, ROOM = 16, 40, 4, 64
QUICK = {
    "dejavu": "dejavu:epochs=2,batch=32",
    "moefication": "moefication:neurons=2",
    "heads-router": "heads-router:epochs=2,batch=32,dense_layers=0",
}
OPTIONS = [
    "griffin:refresh_every=3@0.5",
    "griffin:source=gate@0.5",
    "griffin:compensate=true@0.5",
    "cats:compensate=true@0.5",
    "cats:protect=0.2@0.5",
    "countdown:compensate=true@0.4",
    "cett:compensate=true@0.5",
    "dejavu:epochs=2,batch=32,input=lookahead@0.5",
    "dejavu:epochs=2,batch=32,input=parallel,protect=0.1@0.5",
    "moefication:neurons=2,router=mlp,epochs=2,batch=32@0.5",
    "moefication:neurons=2,routing=sequence@0.5",
]


@pytest.fixture(scope="module")
def loaded(tiny_loaded: Callable) -> LoadedModel:
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel) -> TextCalibration:
    text = words(400, seed=3)
    blocks = blocks_of(text, make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="calibration")
    return of_blocks(loaded, blocks, PROMPT, Silent())


@pytest.fixture(scope="module")
def engines(loaded: LoadedModel) -> Engines:
    return Engines(loaded.sites)


def fitted(name: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(name), calibration, loaded.record.step, gated=True)[0]


def in_the_masked_path(loaded: LoadedModel, gates: list[LayerGates], ids: Tensor, tokens: Tensor) -> Tensor:
    plan = MaskedPlan(gates, prompt_length=ids.shape[1], sink_tokens=SINK)
    cache = new_cache(loaded.model, ROOM)
    with masked(loaded.sites, plan):
        prefill(loaded.model, ids, cache)
        return forced(loaded.model, tokens, cache, ids.shape[1])


def in_the_engine(engines: Engines, gates: list[LayerGates], ids: Tensor, tokens: Tensor) -> Tensor:
    with engines.open(gates, sink_tokens=SINK, max_length=ROOM, batch=len(ids)) as run:
        assert run.tier == 1
        run.prefill(ids, watch=True)
        run.select()
        run.use(sparse=True)
        first = run.forced(tokens)
        run.rewind()
        assert torch.equal(run.forced(tokens), first), "a run left something behind"
        assert run.announced == []
        return first


@pytest.mark.parametrize("name", [*(f"{QUICK.get(name, name)}@0.5" for name in all_methods()), *OPTIONS])
def test_the_engine_is_the_masked_path(
    name: str, loaded: LoadedModel, calibration: TextCalibration, engines: Engines
) -> None:
    plan = fitted(name, loaded, calibration)
    ids, tokens = token_ids(1, PROMPT, seed=5), token_ids(1, 8, seed=6)
    if not plan.method.has_engine or plan.method.ideal:
        with pytest.raises(PlanError, match="no engine"):
            in_the_engine(engines, plan.gates(), ids, tokens)
        return
    expected = in_the_masked_path(loaded, plan.gates(), ids, tokens)
    torch.testing.assert_close(in_the_engine(engines, plan.gates(), ids, tokens), expected, atol=1e-4, rtol=1e-4)


TWO_IN_ONE_MLP = {
    "gate by channels": (SiteKind.GATE, (Unit.GATE,)),
    "up by channels": (SiteKind.GATE, (Unit.UP,)),
    "both by channels": (SiteKind.GATE, (Unit.GATE, Unit.UP)),
    "up decides, gate by channels": (SiteKind.UP, (Unit.GATE,)),
    "up decides by channels": (SiteKind.UP, (Unit.UP,)),
    "the neuron decides": (SiteKind.NEURON, (Unit.GATE, Unit.UP)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fill", [None, 0.02])
@pytest.mark.parametrize("name", TWO_IN_ONE_MLP)
def test_neurons_and_channels_of_one_mlp(
    name: str, fill: float | None, batch: int, loaded: LoadedModel, engines: Engines
) -> None:
    site, units = TWO_IN_ONE_MLP[name]
    filled = None if fill is None else torch.full((loaded.sites.layers[0].mlp_weights().up.shape[0],), fill)
    cut = {SiteKind.GATE: 0.02, SiteKind.UP: 0.1, SiteKind.NEURON: 0.005}[site]
    neurons = TokenGate(site=site, rule=Threshold(cut), fill=filled)
    rules = {unit: ChannelRule(TopK(20) if unit is Unit.UP else Threshold(0.5)) for unit in units}
    gates = [LayerGates(neurons=neurons, channels=ChannelGate(rules))] * 2
    ids, tokens = token_ids(batch, PROMPT, seed=5), token_ids(batch, 8, seed=6)
    expected = in_the_masked_path(loaded, gates, ids, tokens)
    dense = in_the_masked_path(loaded, [LayerGates()] * 2, ids, tokens)
    assert not torch.allclose(expected, dense, atol=1e-3)
    torch.testing.assert_close(in_the_engine(engines, gates, ids, tokens), expected, atol=1e-4, rtol=1e-4)


def test_channels_of_down_beside_neurons_are_refused(loaded: LoadedModel, engines: Engines) -> None:
    neurons = TokenGate(site=SiteKind.GATE, rule=Threshold(0.1))
    gates = [LayerGates(neurons=neurons, channels=ChannelGate({Unit.DOWN: ChannelRule(Threshold(0.1))}))] * 2
    with pytest.raises(PlanError, match="down projection"):
        in_the_engine(engines, gates, token_ids(1, PROMPT), token_ids(1, 4))


@pytest.mark.parametrize(
    "name", ["griffin@0.5", "cats@0.5", "dejavu:epochs=2,batch=32@0.5", "griffin:refresh_every=3@0.5"]
)
def test_sequences_of_a_batch_are_sparse_each_for_itself(
    name: str, loaded: LoadedModel, calibration: TextCalibration, engines: Engines
) -> None:
    gates = fitted(name, loaded, calibration).gates()
    ids, tokens = token_ids(3, PROMPT, seed=5), token_ids(3, 8, seed=6)
    alone = [in_the_engine(engines, gates, ids[i : i + 1], tokens[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(in_the_engine(engines, gates, ids, tokens), torch.cat(alone), atol=1e-4, rtol=1e-4)


def read_share(engines: Engines, gates: Sequence[LayerGates], ids: Tensor, tokens: Tensor) -> dict:
    """What an engine counts as read of these tokens, fed a second time after counting began anew."""
    with engines.open(gates, sink_tokens=SINK, max_length=ROOM) as run:
        run.prefill(ids, watch=True)
        run.select()
        run.use(sparse=True)
        run.feed(tokens)
        run.forget()
        run.rewind()
        run.feed(tokens)
        return run.kept()


def test_what_is_read_is_counted(loaded: LoadedModel, calibration: TextCalibration, engines: Engines) -> None:
    gates = fitted("cats@0.5", loaded, calibration).gates()
    ids, tokens = token_ids(1, PROMPT, seed=5), token_ids(1, 8, seed=6)
    plan = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)
    cache = new_cache(loaded.model, ROOM)
    with masked(loaded.sites, plan):
        prefill(loaded.model, ids, cache)
        forced(loaded.model, tokens, cache, PROMPT)
    found = read_share(engines, gates, ids, tokens)
    assert [found["neuron", layer] for layer in range(2)] == pytest.approx(plan.kept_frac())
    assert [found["second", layer] for layer in range(2)] == pytest.approx(plan.kept_frac())


def test_tokens_that_run_dense_count_as_read(
    loaded: LoadedModel, calibration: TextCalibration, engines: Engines
) -> None:
    gates = fitted("griffin:refresh_every=3@0.5", loaded, calibration).gates()
    ids, tokens = token_ids(1, PROMPT, seed=5), token_ids(1, 9, seed=6)
    found = read_share(engines, gates, ids, tokens)
    assert [found["neuron", layer] for layer in range(2)] == pytest.approx([(6 * 0.5 + 3) / 9] * 2, abs=0.01)


@pytest.mark.parametrize("name", ["griffin@0.5", "static@0.3"])
def test_compiled_kernels_read_what_lists_name_and_other_steps_on_a_device_do_not_know(
    name: str, loaded: LoadedModel, calibration: TextCalibration, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = fitted(name, loaded, calibration).gates()

    def shares(gates: list[LayerGates], batch: int, most: int | None) -> dict[tuple[str, int], float]:
        """What a run says that it read; `most`: as an engine that counts nothing, whose compiled kernels decode so many
        sequences."""
        ids = token_ids(batch, PROMPT, seed=5)
        with engines.open(gates, sink_tokens=SINK, max_length=ROOM, batch=batch) as run:
            run.prefill(ids, watch=True)
            run.select()
            run.use(sparse=True)
            run.rewind()
            run.feed(ids[:, :4])
            if most is not None:
                monkeypatch.setattr(run, "_engine", object())
                monkeypatch.setattr(run, "_counting", None)
                monkeypatch.setattr(OwnSteps, "most_sequences", most)
            return run.kept()

    assert shares(gates, 1, most=1) == pytest.approx(shares(gates, 1, most=None))
    assert shares(gates, 2, most=1) == {}
    assert shares(gates, 1, most=0) == {}  # nothing compiled: torch gathers every row
    assert shares(fitted("griffin:refresh_every=3@0.5", loaded, calibration).gates(), 1, most=1) == {}


def test_greedy_text_stops_and_a_seed_gives_the_same_text(engines: Engines) -> None:
    ids = token_ids(2, PROMPT, seed=8)
    with engines.open((), sink_tokens=SINK, max_length=ROOM, batch=2) as run:
        run.prefill(ids, watch=False)
        whole = run.generate(20)
        assert [len(row) for row in whole] == [20, 20]
        stop = whole[0][9]
        cut = run.generate(20, stop=frozenset({stop}))
        assert cut[0] == whole[0][: whole[0].index(stop) + 1]
        drawn = [run.generate(12, sampling=Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("family", ["opt", "gpt2", "mpt"])
def test_other_families_run_their_own_forward_and_say_so(family: str, tiny_loaded: Callable) -> None:
    loaded = tiny_loaded(family)
    ids = token_ids(1, PROMPT)
    with Engines(resolve(loaded.model)).open((), sink_tokens=SINK, max_length=ROOM) as run:
        assert run.tier == tier_of(family)
        assert "no step of its own" in run.announced[0]
        run.prefill(ids, watch=False)
        text = run.generate(8)[0]
    with torch.no_grad():
        expected = loaded.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    same = sum(one == other for one, other in zip(text, expected[0, PROMPT:].tolist(), strict=True))
    assert same == 8 or loaded.model.generation_config.eos_token_id in text


@pytest.mark.parametrize("name", ["griffin@0.5", "static@0.25", "cats@0.5", "chess@0.5", "countdown@0.5"])
def test_what_cuda_kernels_run_means_the_same(
    name: str, loaded: LoadedModel, calibration: TextCalibration, engines: Engines
) -> None:
    gates = fitted(name, loaded, calibration).gates()
    ids, tokens = token_ids(1, PROMPT, seed=5), token_ids(1, 6, seed=6)
    expected = in_the_engine(engines, gates, ids, tokens)
    assert isinstance(engines.own, OwnSteps)
    plan = engines.own.translator.plan(gates, 1)
    folded = fold(plan)
    assert folded is not None
    assert not isinstance(folded, DensePlan)
    with engines.open(gates, sink_tokens=SINK, max_length=ROOM) as run:
        assert isinstance(run, OwnRun)
        run.prefill(ids, watch=True)
        run.select()
        assert run._plan is not None
        assert run._plan.selection is not None
        assert plan.selection is not None
        plan.selection.index.copy_(run._plan.selection.index)
        plan.selection.count.copy_(run._plan.selection.count)
    cache = DynamicCache(config=loaded.model.config)
    prefill(loaded.model, ids, cache)
    decoder = Decoder(engines.own.weights, max_length=ROOM)
    decoder.load_prefill(cache, tokens[:, 0])
    decoder.force(tokens[:, 1:])
    decoder.set_plan(folded)
    for at in range(tokens.shape[1]):
        decoder.decode(1)
        torch.testing.assert_close(decoder.state.logits, expected[:, at], atol=1e-4, rtol=1e-4)


def test_what_is_no_plan_of_few_kernels_is_not_folded(
    loaded: LoadedModel, calibration: TextCalibration, engines: Engines
) -> None:
    assert isinstance(engines.own, OwnSteps)
    for name, batch in (("griffin:compensate=true@0.5", 1), ("griffin@0.5", 2), ("cett@0.5", 1)):
        gates = fitted(name, loaded, calibration).gates()
        assert fold(engines.own.translator.plan(gates, batch)) is None
