"""Random and static controls over channels and heads against naive versions, and when an evaluation adds them."""

from collections.abc import Callable
from math import floor

import pytest
import torch
from hooked import inputs_of, weight_of
from lengths import PROMPT, SINK
from tiny import HEADS, LAYERS, token_ids
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.errors import PlanError
from actsparse.methods.gates import ChannelGate, ChannelRule, Fixed, LayerGates
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.plans import build, controls_of
from actsparse.pipelines.progress import Silent
from actsparse.results import SiteKind, Sparsity, Unit

KV_HEADS = 2


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> list[Plan]:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=loaded.record.gated)


def channels_of(plan: Plan) -> dict[tuple[int, Unit], Tensor]:
    found = {}
    for layer, gates in enumerate(plan.gates()):
        for unit, rule in gates.rules.items():
            assert isinstance(rule.rule, Fixed)
            found[layer, unit] = rule.rule.mask
    return found


def groups_of(plan: Plan) -> list[list[int]]:
    """The groups that each layer keeps."""
    found = []
    for gates in plan.gates():
        rule = gates.heads.rule if gates.heads else None
        assert rule is None or isinstance(rule, Fixed)
        found.append(list(range(KV_HEADS)) if rule is None else rule.mask.nonzero().squeeze(1).tolist())
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("stat", ["mean_n", "mean_abs"])
def test_static_channels_are_the_top_of_their_mean(
    family: str, stat: str, tiny_loaded: Callable, blocks: Sequences
) -> None:
    loaded = tiny_loaded(family)
    plan = fitted(f"channels-static:stat={stat}@0.4", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))[0]
    found, inputs = channels_of(plan), inputs_of(loaded, blocks)
    assert found.keys() == inputs.keys()
    for (layer, unit), x in inputs.items():
        mean = x.double().abs().mean(dim=0)
        scores = mean * weight_of(loaded, layer, unit).double().norm(dim=0) if stat == "mean_n" else mean
        k = max(1, floor(0.6 * len(mean) + 0.5))
        assert set(found[layer, unit].nonzero().squeeze(1).tolist()) == set(scores.topk(k).indices.tolist())


def test_random_channels_are_three_seeds_of_the_definition(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plans = fitted("channels-random@0.3", loaded, calibration)
    assert len(plans) == 3
    for seed, plan in enumerate(plans):
        generator = torch.Generator().manual_seed(seed)
        for mask in channels_of(plan).values():
            k = max(1, floor(0.7 * len(mask) + 0.5))
            naive = sorted(torch.randperm(len(mask), generator=generator)[:k].tolist())
            assert mask.nonzero().squeeze(1).tolist() == naive
    (alone,) = fitted("channels-random:seed=1@0.3", loaded, calibration)
    assert all(torch.equal(mask, channels_of(plans[1])[place]) for place, mask in channels_of(alone).items())


def test_a_fixed_rule_keeps_its_channels_at_every_token(loaded: LoadedModel, calibration: TextCalibration) -> None:
    """The same as a model whose other columns are zero."""
    masks = channels_of(fitted("channels-static@0.5", loaded, calibration)[0])
    gates = [
        LayerGates(channels=ChannelGate({u: ChannelRule(Fixed(mask)) for (i, u), mask in masks.items() if i == layer}))
        for layer in range(LAYERS)
    ]
    ids = token_ids(1, 12, seed=4)
    with torch.no_grad():
        with masked(loaded.sites, MaskedPlan(gates, prompt_length=1, sink_tokens=0)):
            sparse = loaded.model(input_ids=ids, use_cache=False).logits
        kept = {}
        try:
            for (layer, unit), mask in masks.items():
                weight = loaded.sites.layers[layer].projections[unit].module.get_parameter("weight")
                kept[layer, unit] = weight.clone()
                weight *= mask
            naive = loaded.model(input_ids=ids, use_cache=False).logits
        finally:
            for (layer, unit), weight in kept.items():
                loaded.sites.layers[layer].projections[unit].module.get_parameter("weight").copy_(weight)
    # the first position is the prompt, whose keys and values are dense in the one and not in the other
    assert not torch.allclose(sparse, naive, atol=1e-3)
    with torch.no_grad(), masked(loaded.sites, MaskedPlan(gates, prompt_length=0, sink_tokens=0)):
        everywhere = loaded.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(everywhere, naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_static_heads_add_most_on_the_calibration_text(family: str, tiny_loaded: Callable, blocks: Sequences) -> None:
    loaded = tiny_loaded(family)
    calibration = of_blocks(loaded, blocks, PROMPT, Silent())
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    with tapped(loaded.sites, {SiteKind.ATTN_OUT: lambda site, x: outputs[site.layer].append(x[0, SINK:].double())}):
        for block in blocks.stack():
            with torch.no_grad():
                loaded.model(input_ids=block[None], use_cache=False)
    found = groups_of(fitted("heads-static:dense_layers=0@0.5", loaded, calibration)[0])
    for layer, rows in outputs.items():
        parts = torch.cat(rows).chunk(KV_HEADS, dim=1)
        columns = loaded.sites.layers[layer].output.get_parameter("weight").detach().double().chunk(KV_HEADS, dim=1)
        means = [float((x @ w.T).norm(dim=1).mean()) for x, w in zip(parts, columns, strict=True)]
        assert found[layer] == [max(range(KV_HEADS), key=means.__getitem__)]


def test_random_heads_are_drawn_for_every_layer(tiny_loaded: Callable, blocks: Sequences) -> None:
    loaded = tiny_loaded("gpt2")  # no shared keys: as many groups as heads
    plans = fitted("heads-random:dense_layers=0@0.5", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))
    for seed, plan in enumerate(plans):
        generator = torch.Generator().manual_seed(seed)
        for gates in plan.gates():
            assert gates.heads is not None
            naive = sorted(torch.randperm(HEADS, generator=generator)[: HEADS // 2].tolist())
            assert gates.heads.rule.keep(torch.ones(1, 1, 8))[0, 0].nonzero().squeeze(1).tolist() == naive


@pytest.mark.parametrize("name", ["heads-static", "heads-random"])
def test_controls_over_heads_leave_the_first_layer_dense(
    name: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    for plan in fitted(f"{name}:policy=drop@0.5", loaded, calibration):
        gates = plan.gates()
        assert gates[0].heads is None
        assert gates[1].heads is not None
        assert gates[1].heads.policy == "drop"
        assert plan.predicted.head_frac == pytest.approx(0.5 / LAYERS)


def dropped(**shares: float) -> Sparsity:
    every = {"neuron_frac": None, "mlp_bytes_frac": 0.0, "model_bytes_frac": 0.0}
    return Sparsity(**(every | shares))


@pytest.mark.parametrize(
    ("name", "found", "controls"),
    [
        ("teal@0.5", dropped(channel_frac=0.503),
         {"channels-static@0.5", "channels-random@0.5", "channels-static:stat=mean_abs@0.5"}),
        ("teal@0.5", dropped(channel_frac=0.53),
         {"channels-static@0.53", "channels-random@0.53", "channels-static:stat=mean_abs@0.53"}),
        ("wina@0.4", dropped(channel_frac=0.4), {"channels-static@0.4", "channels-random@0.4"}),
        ("heads-oracle@0.5", dropped(head_frac=0.25), {"heads-static@0.5", "heads-random@0.5"}),
        ("heads-oracle:policy=lazy,dense_layers=0@0.5", dropped(head_frac=0.5),
         {"heads-static:policy=lazy,dense_layers=0@0.5", "heads-random:policy=lazy,dense_layers=0@0.5"}),
        ("heads-oracle@0", dropped(head_frac=0.0), set()),
        ("channels-static@0.5", dropped(channel_frac=0.5), set()),
        ("heads-random@0.5", dropped(head_frac=0.25), set()),
    ],
)  # fmt: skip
def test_an_evaluation_adds_controls_of_the_same_units(
    name: str, found: Sparsity, controls: set[str], loaded: LoadedModel, calibration: TextCalibration
) -> None:
    groups = build([name], loaded, calibration, loaded.record.step)
    added = controls_of(groups, {name: found}, loaded, calibration, loaded.record.step)
    assert {group.name for group in added} == controls
    for group in added:
        own = group.plan.predicted
        assert (own.channel_frac, own.head_frac) == (
            pytest.approx(found.channel_frac, abs=0.02) if found.channel_frac else None,
            pytest.approx(found.head_frac) if found.head_frac else None,
        )


def test_a_mix_of_units_gets_the_channels_of_as_many_bytes(loaded: LoadedModel, calibration: TextCalibration) -> None:
    name, found = "auto:methods=cats@0.1", dropped(neuron_frac=0.2, channel_frac=0.1, model_bytes_frac=0.15)
    groups = build([name], loaded, calibration, loaded.record.step)
    added = controls_of(groups, {name: found}, loaded, calibration, loaded.record.step)
    channels = [group for group in added if group.plan.predicted.channel_frac is not None]
    assert {group.plan.method.name for group in channels} == {"channels-static", "channels-random"}
    for group in channels:
        assert group.plan.predicted.model_bytes_frac == pytest.approx(0.15, abs=0.01)
    assert {group.name for group in added if group not in channels} == {
        "static:stat=griffin@0.2", "static@0.2", "random@0.2",
    }  # fmt: skip


def test_wrong_options_are_refused() -> None:
    wrong = {
        "heads-random:dense_layers=-1@0.5": "heads-random: dense_layers",
        "heads-random:seed=-2@0.5": "heads-random: seed",
        "channels-random:seed=-2@0.5": "channels-random: seed",
        "channels-static:stat=griffin@0.5": "stat cannot be 'griffin'",
    }
    for text, named in wrong.items():
        with pytest.raises(PlanError, match=named):
            parse(text)
