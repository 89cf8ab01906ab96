"""Methods over heads: KV groups chosen by oracle or router, what they keep, what they cost, and their KV policies."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from lengths import BLOCK, PROMPT
from tiny import HEADS, LAYERS, make_model, token_ids
from torch import Tensor
from transformers import DynamicCache

from actsparse.core.masks import kept_count
from actsparse.engine.generation import sparse_generation
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import ModelError, PlanError
from actsparse.methods.gates import Custom, HeadGate, LayerGates
from actsparse.methods.plan import Plan, fit_plan, from_record, to_record
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import ModelSites, resolve
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration
from actsparse.results import KvPolicy, Site, SiteKind, ThresholdPlan, Unit
from actsparse.store.codec import decode, encode

GROUPS = 2
ROUTER = "heads-router:epochs=3,rate=0.01,rank=16"
every_method = pytest.mark.parametrize("name", ["heads-oracle", ROUTER, "heads-random", "heads-static"])
every_policy = pytest.mark.parametrize("policy", list(KvPolicy))


def with_options(name: str, **options: object) -> str:
    return name + (",:"[":" not in name]) + ",".join(f"{key}={value}" for key, value in options.items())


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]


def logits_of(sites: ModelSites, gates: list[LayerGates], ids: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
    model: Any = sites.model
    plan = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=2)
    with masked(sites, plan), torch.no_grad():
        if not cuts:
            return model(input_ids=ids, use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), []
        for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            parts.append(model(input_ids=ids[:, start:stop], past_key_values=cache).logits)
        return torch.cat(parts, dim=1)


@every_method
def test_the_first_layer_is_dense_and_others_keep_their_count(
    name: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    for drop in (0.0, 0.5, 0.9):
        kept = kept_count(1 - drop, GROUPS)
        plan = fitted(f"{name}@{drop}", loaded, calibration)
        assert [(one.unit, one.width, one.kept) for one in plan.fit.layers] == [
            (Unit.KV_GROUP, GROUPS, GROUPS),
            (Unit.KV_GROUP, GROUPS, kept),
        ]
        assert (plan.predicted.head_frac or 0) == pytest.approx((1 - kept / GROUPS) / LAYERS)
        assert plan.predicted.neuron_frac is None
        run = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=2)
        with masked(loaded.sites, run), torch.no_grad():
            loaded.model(input_ids=token_ids(2, BLOCK), use_cache=False)
        assert run.kept_frac(Unit.KV_GROUP) == [1.0, kept / GROUPS]
    everywhere = fitted(with_options(name, dense_layers=0) + "@0.5", loaded, calibration)
    assert [one.kept for one in everywhere.fit.layers] == [1, 1]


@every_method
def test_target_0_is_dense_bit_for_bit(name: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    ids = token_ids(2, BLOCK, seed=1)
    with torch.no_grad():
        dense = loaded.model(input_ids=ids, use_cache=False).logits
    for policy in KvPolicy:
        plan = fitted(with_options(name, policy=policy) + "@0", loaded, calibration)
        assert torch.equal(logits_of(loaded.sites, plan.gates(), ids), dense)


def test_the_oracle_keeps_the_group_that_adds_most(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan, ids = fitted("heads-oracle@0.5", loaded, calibration), token_ids(1, BLOCK, seed=2)
    outputs: dict[int, Tensor] = {}
    with tapped(loaded.sites, {SiteKind.ATTN_OUT: lambda site, x: outputs.update({site.layer: x[0]})}), torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    gate = plan.gates()[1].heads
    assert gate is not None
    matrix = loaded.sites.layers[1].output.get_parameter("weight")
    for o in outputs[1]:
        width = len(o) // GROUPS
        added = [matrix[:, g * width : (g + 1) * width] @ o[g * width : (g + 1) * width] for g in range(GROUPS)]
        largest = max(range(GROUPS), key=lambda g: float(added[g].norm()))
        assert gate.rule.keep(o[None, None])[0, 0].tolist() == [g == largest for g in range(GROUPS)]


def test_a_routers_recall_is_that_of_the_oracles_groups(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted(ROUTER + "@0.5", loaded, calibration)
    assert plan.fit.layers[0].recall is None
    recall = plan.fit.layers[1].recall
    assert recall is not None
    assert 0 <= recall <= 1
    ahead = fitted(with_options(ROUTER, input="lookahead") + "@0.5", loaded, calibration)
    gate = ahead.gates()[1].heads
    assert gate is not None
    assert gate.ahead == 1
    assert not torch.equal(ahead.fit.tensors["layers.1.router.first"], plan.fit.tensors["layers.1.router.first"])


def test_a_planted_rule_is_learnt() -> None:
    """Where one group's values follow the first channel's sign, a router reads it off its input."""
    from actsparse.core.router_training import Examples, RouterWeights, Schedule, train, weighted_bce

    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([x[:, 0] > 0, x[:, 0] <= 0], dim=1)
    examples = Examples(x[:500], labels[:500], x[500:], labels[500:], 1)
    found = train(
        RouterWeights.drawn(8, 8, 2, 0), examples, weighted_bce, Schedule(epochs=30, rate=0.01), lambda _n: None
    )
    assert found.recall > 0.95


@every_method
@pytest.mark.parametrize(
    ("policy", "saves"), [("compute_all", "qo"), ("lazy", "qo"), ("drop", "qkvo"), ("zero", "qkvo")]
)
def test_bytes_are_those_of_a_dropped_group(
    name: str, policy: str, saves: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan, step = fitted(with_options(name, policy=policy) + "@0.5", loaded, calibration), loaded.record.step
    unread = 0.5 * sum(step.projections[one] for one in saves)
    extra = sum(t.numel() * t.element_size() for name, t in plan.fit.tensors.items() if "router" in name)
    assert (extra > 0) == name.startswith("heads-router")
    assert plan.predicted.model_bytes_frac == pytest.approx((unread - extra) / step.total)


@every_method
def test_a_plan_survives_the_disk(name: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted(with_options(name, policy="drop") + "@0.5", loaded, calibration)
    record = decode(encode(to_record(plan, loaded.record, None)), ThresholdPlan, "plan")
    read = from_record(record, plan.fit.tensors, "read")
    ids = token_ids(1, BLOCK, seed=3)
    assert torch.equal(logits_of(loaded.sites, read.gates(), ids), logits_of(loaded.sites, plan.gates(), ids))
    assert read.method == plan.method


@every_method
@every_policy
def test_token_by_token_equals_one_pass(name: str, policy: KvPolicy, calibration: TextCalibration) -> None:
    sites = resolve(make_model("llama").double())
    loaded_plan = fit_plan(
        parse(with_options(name, policy=policy) + "@0.5"), calibration, _step(calibration), gated=True
    )
    gates, ids = loaded_plan[0].gates(), token_ids(1, BLOCK, seed=4)
    whole = logits_of(sites, gates, ids)
    steps = logits_of(sites, gates, ids, tuple(range(PROMPT, BLOCK)))
    torch.testing.assert_close(steps, whole, atol=1e-9, rtol=1e-9)


def _step(calibration: TextCalibration) -> Any:
    return calibration._replay.loaded.record.step


@every_method
@every_policy
def test_a_batch_of_two_equals_two_batches_of_one(name: str, policy: KvPolicy, calibration: TextCalibration) -> None:
    sites = resolve(make_model("llama").double())
    gates = fit_plan(parse(with_options(name, policy=policy) + "@0.5"), calibration, _step(calibration), gated=True)[
        0
    ].gates()
    ids = token_ids(2, BLOCK, seed=5)
    both = logits_of(sites, gates, ids)
    for index in range(2):
        alone = logits_of(sites, gates, ids[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-9, rtol=1e-9)


def test_policies_change_what_later_tokens_see(loaded: LoadedModel, calibration: TextCalibration) -> None:
    ids = token_ids(1, BLOCK, seed=6)
    found = {
        policy: logits_of(loaded.sites, fitted(f"heads-oracle:policy={policy}@0.5", loaded, calibration).gates(), ids)
        for policy in KvPolicy
    }
    torch.testing.assert_close(found[KvPolicy.LAZY], found[KvPolicy.COMPUTE_ALL], atol=1e-4, rtol=1e-4)
    for one, other in product((KvPolicy.COMPUTE_ALL, KvPolicy.DROP, KvPolicy.ZERO, KvPolicy.COPY_PREV), repeat=2):
        assert one is other or not torch.allclose(found[one], found[other], atol=1e-3)


@every_policy
def test_generate_applies_the_policy(policy: KvPolicy, loaded: LoadedModel, calibration: TextCalibration) -> None:
    gates = fitted(f"heads-oracle:policy={policy},dense_layers=0@0.5", loaded, calibration).gates()
    model: Any = loaded.model
    prompts = [token_ids(1, PROMPT, seed=8), token_ids(1, PROMPT + 3, seed=9)]
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    with sparse_generation(loaded.sites, gates, sink_tokens=2):
        found = [model.generate(ids, **settings) for ids in prompts]
    for ids, text in zip(prompts, found, strict=True):
        plan = MaskedPlan(gates, prompt_length=ids.shape[1], sink_tokens=2)
        cache, fed, expected = DynamicCache(config=model.config), ids, ids
        with masked(loaded.sites, plan), torch.no_grad():
            for _ in range(20):
                fed = model(input_ids=fed, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
                expected = torch.cat([expected, fed], dim=1)
        assert torch.equal(text, expected)


def test_local_errors_are_those_of_the_heads_left_out(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan, ids = fitted("heads-oracle@0.5", loaded, calibration), token_ids(1, BLOCK, seed=7)
    probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=2)
    outputs: list[Tensor] = []

    def see(site: Site, x: Tensor) -> None:
        outputs.append(x[0, PROMPT:])

    with tapped(loaded.sites, {SiteKind.ATTN_OUT: see}, (1,)), probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    matrix = loaded.sites.layers[1].output.get_parameter("weight").detach()
    errors = []
    for o in outputs[0]:
        width = len(o) // GROUPS
        added = torch.stack(
            [matrix[:, g * width : (g + 1) * width] @ o[g * width : (g + 1) * width] for g in range(GROUPS)]
        )
        errors.append(float(added[added.norm(dim=1).argmin()].norm() / added.sum(dim=0).norm()))
    assert probe.tally(Unit.KV_GROUP, 1).mean_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_wrong_options_are_refused() -> None:
    wrong = {
        "heads-oracle:policy=keep@0.5": "policy",
        "heads-oracle:dense_layers=-1@0.5": "dense_layers",
        "heads-router:rank=0@0.5": "rank",
    }
    for text, named in wrong.items():
        with pytest.raises(PlanError, match=named):
            parse(text)


def test_a_closed_attention_is_refused_where_a_policy_needs_it(tiny_loaded: Callable) -> None:
    bloom = tiny_loaded("bloom")
    every_second = Custom(lambda x: (torch.arange(HEADS) % 2 == 0).expand(*x.shape[:-1], HEADS))
    gate = HeadGate(SiteKind.ATTN_IN, every_second)
    ids = token_ids(1, BLOCK)
    logits_of(bloom.sites, [LayerGates(heads=gate)] * LAYERS, ids)
    with pytest.raises(ModelError, match="'bloom'"):
        logits_of(bloom.sites, [LayerGates(heads=replace(gate, policy=KvPolicy.DROP))] * LAYERS, ids)


def test_a_rule_that_reads_what_comes_later_is_refused(loaded: LoadedModel) -> None:
    gate = HeadGate(SiteKind.MLP_IN, Custom(lambda x: x[..., :GROUPS] > 0), policy=KvPolicy.ZERO)
    with pytest.raises(PlanError, match="known after attention"):
        logits_of(loaded.sites, [LayerGates(heads=gate)] * LAYERS, token_ids(1, BLOCK))
