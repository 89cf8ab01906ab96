"""The contract of every row of the family table, on a tiny random model of its type."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CONFIGS, FFN, FFN_WIDTHS, LAYERS, WIDTHS, make_model, tiny_model, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from actsparse.core.overlap import topk_masks
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.errors import ModelError
from actsparse.methods.gates import Custom, FixedGate, LayerGates, PrefillGate, Threshold, TokenGate
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.cost import embedding_and_head
from actsparse.models.experts import IMPLEMENTATION
from actsparse.models.families import FAMILIES, _has_encoder, family_of
from actsparse.models.sites import LayerSites, ModelSites, resolve
from actsparse.models.taps import tapped
from actsparse.results import Site, SiteKind, Unit

BATCH, LENGTH = 2, 11
every_family = pytest.mark.parametrize("family", list(FAMILIES))
dense_families = pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.experts is None])


def kinds_of(sites: ModelSites) -> list[SiteKind]:
    missing = {SiteKind.KV} | (set() if sites.gated else {SiteKind.UP})
    missing |= set() if sites.moe_layers else {SiteKind.ROUTER}
    return [kind for kind in SiteKind if kind not in missing]


def logits_of(sites: ModelSites, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return sites.model(input_ids=ids, use_cache=False).logits


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def seen(sites: ModelSites, ids: Tensor, **edits: Callable[[Tensor], Tensor]) -> dict[Site, Tensor]:
    """What every site shows in one pass, with edits by kind in the last layer."""
    values: dict[Site, Tensor] = {}

    def look(site: Site, x: Tensor) -> Tensor | None:
        values[site] = x.clone()
        return edits[site.kind](x) if site.kind in edits and site.layer == LAYERS - 1 else None

    with tapped(sites, dict.fromkeys(kinds_of(sites), look)):
        logits_of(sites, ids)
    return values


def output_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The output of a module in a pass, by a hook of the test's own."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: found.append(output.clone()))
    run()
    handle.remove()
    return found[-1]


def naive_neurons(layer: LayerSites, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """act(g), u and a of an MLP input, from its matrices."""
    w = layer.mlp_weights()
    up = F.linear(x, w.up, w.up_bias)
    if w.gate is None:
        a = layer.activation(up)
        return a, None, a
    gate = layer.activation(F.linear(x, w.gate, w.gate_bias))
    return gate, up, gate * up


def test_every_row_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(CONFIGS)


@every_family
def test_resolve_finds_layers_widths_and_all_parameters(family: str) -> None:
    sites = resolve(tiny_model(family))
    assert [layer.index for layer in sites.layers] == list(range(LAYERS))
    hidden = embedding_and_head(sites)[0].shape[1]
    for layer in sites.layers:
        assert [ffn.width for ffn in layer.ffns] == FFN_WIDTHS[family]
        for ffn in layer.ffns:
            weights = ffn.weights()
            assert weights.up.shape == (ffn.width, hidden)
            assert weights.down.shape == ffn.down_matrix().shape == (hidden, ffn.width)
            assert (weights.gate is None) == (not sites.gated)
        modules = layer.linears if layer.experts is None else (*layer.linears, layer.experts.module)
        covered = sum(p.numel() for module in modules for p in module.parameters())
        assert covered >= 0.95 * sum(p.numel() for p in layer.block.parameters())
        assert len({id(linear) for linear in layer.linears}) == len(layer.linears)
    assert len({id(linear) for layer in sites.layers for linear in layer.linears}) == sum(
        len(layer.linears) for layer in sites.layers
    )


@every_family
def test_views_are_batch_seq_width_and_recording_changes_no_bit(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids = token_ids(BATCH, LENGTH)
    dense = logits_of(sites, ids)
    calls: list[Site] = []
    shapes: dict[Site, tuple[int, ...]] = {}

    def look(site: Site, x: Tensor) -> None:
        calls.append(site)
        shapes[site] = tuple(x.shape)

    with tapped(sites, dict.fromkeys(kinds_of(sites), look)):
        recorded = logits_of(sites, ids)
    assert torch.equal(recorded, dense)
    inside = {SiteKind.GATE, SiteKind.UP, SiteKind.NEURON} & set(kinds_of(sites))
    expected = {Site(layer=i, kind=kind) for i in range(LAYERS) for kind in kinds_of(sites) if kind not in inside}
    expected |= {Site(layer=ffn.layer.index, kind=kind, expert=ffn.expert) for ffn in sites.ffns for kind in inside}
    assert len(calls) == len(set(calls))
    assert set(calls) == expected
    assert all(shape[:2] == (BATCH, LENGTH) for shape in shapes.values())
    for ffn in sites.layers[0].ffns:
        assert {shapes[Site(layer=0, kind=kind, expert=ffn.expert)][2] for kind in inside} == {ffn.width}
    at = {site.kind: shape[2] for site, shape in shapes.items()}
    hidden = sites.layers[0].ffns[0].down_matrix().shape[0]
    assert at[SiteKind.ATTN_IN] == at[SiteKind.MLP_IN] == hidden
    assert sites.layers[0].output_matrix(at[SiteKind.ATTN_OUT]).shape == (hidden, at[SiteKind.ATTN_OUT])


@dense_families
def test_mlp_weights_reproduce_the_mlp(family: str) -> None:
    sites = resolve(tiny_model(family))
    layer = sites.layers[-1]
    ids = token_ids(BATCH, LENGTH, seed=3)
    values = seen(sites, ids)
    at = {kind: values[Site(layer=LAYERS - 1, kind=kind)] for kind in kinds_of(sites)}
    with torch.no_grad():
        gate, up, a = naive_neurons(layer, at[SiteKind.MLP_IN])
        weights = layer.mlp_weights()
        naive = F.linear(a, weights.down, weights.down_bias)
        out = output_of(layer.down, lambda: logits_of(sites, ids)).view_as(naive)
        x = torch.randn(1, 3, at[SiteKind.MLP_IN].shape[-1])
        alone = layer.down(naive_neurons(layer, x)[2])
        torch.testing.assert_close(alone, F.linear(naive_neurons(layer, x)[2], weights.down, weights.down_bias))
    torch.testing.assert_close(at[SiteKind.GATE], gate, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at[SiteKind.NEURON], a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, naive, atol=1e-5, rtol=1e-5)
    if up is not None:
        torch.testing.assert_close(at[SiteKind.UP], up, atol=1e-5, rtol=1e-5)


@dense_families
def test_an_edited_neuron_changes_the_output_as_the_formula_says(family: str) -> None:
    sites = resolve(tiny_model(family))
    layer, ids = sites.layers[-1], token_ids(BATCH, LENGTH, seed=4)
    dense = seen(sites, ids)[Site(layer=LAYERS - 1, kind=SiteKind.NEURON)]
    factor = torch.arange(dense.shape[-1]) % 3 - 1.0
    out = output_of(layer.down, lambda: seen(sites, ids, neuron=lambda a: a * factor))
    weights = layer.mlp_weights()
    naive = F.linear(dense * factor, weights.down, weights.down_bias)
    torch.testing.assert_close(out.view_as(naive), naive, atol=1e-5, rtol=1e-5)


@dense_families
@pytest.mark.parametrize("kind", [SiteKind.GATE, SiteKind.UP, SiteKind.MLP_IN])
def test_an_edit_further_up_reaches_the_neurons(family: str, kind: SiteKind) -> None:
    sites = resolve(tiny_model(family))
    if kind not in kinds_of(sites):
        pytest.skip("a non-gated FFN has no up projection of its own")
    ids, last = token_ids(BATCH, LENGTH, seed=5), LAYERS - 1
    before = seen(sites, ids)
    after = seen(sites, ids, **{kind: lambda x: x * 0.5 + 0.25})
    x = before[Site(layer=last, kind=SiteKind.MLP_IN)]
    with torch.no_grad():
        gate, up, _ = naive_neurons(sites.layers[last], x * 0.5 + 0.25 if kind is SiteKind.MLP_IN else x)
    if kind is SiteKind.GATE:
        gate = gate * 0.5 + 0.25
    if kind is SiteKind.UP and up is not None:
        up = up * 0.5 + 0.25
    naive = gate if up is None else gate * up
    torch.testing.assert_close(after[Site(layer=last, kind=SiteKind.NEURON)], naive, atol=1e-5, rtol=1e-5)


@every_family
def test_no_hook_outlives_an_error(family: str) -> None:
    sites = resolve(tiny_model(family))
    before = hooks_of(sites.model)

    def fail(site: Site, x: Tensor) -> None:
        raise KeyError(site.layer)

    with pytest.raises(KeyError), tapped(sites, {SiteKind.NEURON: fail, SiteKind.GATE: lambda _s, _x: None}):
        logits_of(sites, token_ids(1, 4))
    assert hooks_of(sites.model) == before
    assert sites.model.config._experts_implementation != IMPLEMENTATION


@dense_families
def test_an_all_keep_gate_is_dense_bit_for_bit(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids, width = token_ids(BATCH, LENGTH, seed=6), WIDTHS[family]
    dense = logits_of(sites, ids)
    gates = (
        FixedGate(torch.ones(width, dtype=torch.bool)),
        PrefillGate(PromptStatistic, lambda s: torch.ones_like(s, dtype=torch.bool)),
        TokenGate(SiteKind.GATE, Threshold(0.0)),
    )
    for gate in gates:
        plan = MaskedPlan([LayerGates(neurons=gate)] * LAYERS, prompt_length=5, sink_tokens=2)
        with masked(sites, plan):
            assert torch.equal(logits_of(sites, ids), dense)
        assert plan.kept_frac() == [1.0] * LAYERS
        assert [plan.tally(Unit.NEURON, i).positions for i in range(LAYERS)] == [BATCH * (LENGTH - 5)] * LAYERS


@every_family
def test_generation_runs_sparse_in_the_masked_path(family: str) -> None:
    sites = resolve(tiny_model(family))
    model: Any = sites.model
    ids, steps = token_ids(BATCH, LENGTH, seed=7), 4
    few = LayerGates(neurons=TokenGate(SiteKind.NEURON, Custom(lambda x: topk_masks(x.abs(), 0.1))))

    def generated(plan: MaskedPlan | None) -> list[Tensor]:
        cache, fed, found = DynamicCache(config=model.config), ids, []
        with torch.no_grad(), ExitStack() as stack:
            if plan is not None:
                stack.enter_context(masked(sites, plan))
            for _ in range(steps + 1):
                found.append(model(input_ids=fed, past_key_values=cache).logits[:, -1])
                fed = found[-1].argmax(dim=-1, keepdim=True)
        return found

    plan = MaskedPlan([few] * len(sites.ffns), prompt_length=LENGTH, sink_tokens=2)
    dense, sparse = generated(None), generated(plan)
    assert torch.equal(sparse[0], dense[0])
    assert not torch.allclose(sparse[1], dense[1], atol=1e-3)
    for tally in plan.by_layer(sites).values():
        assert tally.kept_frac == pytest.approx(0.1, abs=0.01)
        assert tally.positions >= BATCH * steps
    assert len(plan.by_layer(sites)) == LAYERS


def test_taps_of_chosen_layers_see_only_these() -> None:
    sites = resolve(tiny_model("llama"))
    layers: list[int] = []
    with tapped(sites, {SiteKind.NEURON: lambda site, _x: layers.append(site.layer)}, layers=(1,)):
        logits_of(sites, token_ids(1, 4))
    assert layers == [1]


def test_up_of_a_non_gated_ffn_is_refused_and_leaves_no_hook() -> None:
    sites = resolve(tiny_model("gpt2"))
    before = hooks_of(sites.model)
    with pytest.raises(ModelError, match="'gpt2' has a non-gated FFN"), tapped(sites, {SiteKind.UP: print}):
        pass
    assert hooks_of(sites.model) == before


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("qwen22", "qwen2"),
        ("gptneox", "gpt_neox"),
        ("Llama", "llama"),
        ("zamba9", "llama"),
        ("brandnew_moe", "mixtral"),
    ],
)
def test_an_unknown_type_names_the_nearest_row(typed: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        family_of(typed)
    assert f"'{typed}'" in caught.value.what
    assert f"'{near}'" in caught.value.hint


@pytest.mark.parametrize("typed", ["bert", "roberta", "t5", "bart"])
def test_a_type_with_an_encoder_is_refused_without_a_row(typed: str) -> None:
    with pytest.raises(ModelError, match=f"'{typed}' has an encoder") as caught:
        family_of(typed)
    assert "--family" not in caught.value.hint


def test_no_row_of_the_table_is_taken_for_an_encoder() -> None:
    assert not [name for name in FAMILIES if _has_encoder(name)]


@pytest.mark.parametrize(
    "change", [{"down": "down_porj"}, {"attention": "attn.core"}, {"output": "o_proj.linear"}, {"gate": "gaet"}]
)
def test_a_wrong_path_in_a_row_is_named(change: dict[str, str]) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(tiny_model("llama"), replace(FAMILIES["llama"], **change))
    assert f"'{next(iter(change.values()))}'" in caught.value.what


def test_a_wrong_path_to_the_layers_is_named() -> None:
    with pytest.raises(ModelError, match=r"'model\.blocks'"):
        resolve(tiny_model("llama"), replace(FAMILIES["llama"], layers="model.blocks"))


def test_a_row_that_misses_a_projection_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"layer 0: only \d+% of its parameters"):
        resolve(tiny_model("llama"), replace(FAMILIES["llama"], qkv=("q_proj",)))


def test_the_same_tap_works_on_another_model_of_the_type() -> None:
    one, other = resolve(tiny_model("opt")), resolve(make_model("opt", seed=1))
    site = Site(layer=0, kind=SiteKind.NEURON)
    ids = token_ids(3, 4)
    first, second = seen(one, ids)[site], seen(other, ids)[site]
    assert first.shape == second.shape == (3, 4, FFN)
    assert not torch.equal(first, second)
