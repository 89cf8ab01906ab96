"""Channels, heads, fills, lookahead and refreshes in the masked path, against models that have them written in."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import FFN, HIDDEN, LAYERS, make_model, tiny_model, token_ids
from torch import Tensor, nn

from actsparse.engine.decode import forced, new_cache, prefill
from actsparse.engine.generation import sparse_generation
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.engine.sparse import why_not_sliced
from actsparse.methods.gates import (
    ChannelGate,
    ChannelRule,
    FixedGate,
    HeadGate,
    LayerGates,
    PrefillGate,
    Router,
    Threshold,
    TokenGate,
    TopK,
)
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.families import FAMILIES
from actsparse.models.shape import shape_of
from actsparse.models.sites import ModelSites, resolve, unit_widths
from actsparse.results import SiteKind, Unit

PROMPT, LENGTH = 7, 19
dense_families = [name for name, row in FAMILIES.items() if row.experts is None]


class Edited(nn.Module):
    """A projection whose input and output a function changes at positions from PROMPT on."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], tuple[Tensor, Tensor | float]]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        whole = x.view(2, -1, x.shape[-1])
        kept, added = self.change(whole[:, PROMPT:])
        edited = torch.cat([whole[:, :PROMPT], kept], dim=1).view_as(x)
        y = self.inner(edited)
        wide = y.view(2, -1, y.shape[-1]).clone()
        wide[:, PROMPT:] += added
        return wide.view_as(y)


def one_pass(sites: ModelSites, gates: list[LayerGates], ids: Tensor) -> tuple[Tensor, MaskedPlan]:
    plan = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=2)
    with masked(sites, plan, errors=True), torch.no_grad():
        return sites.model(input_ids=ids, use_cache=False).logits, plan


def step_by_step(sites: ModelSites, gates: list[LayerGates], ids: Tensor) -> Tensor:
    plan = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=2)
    cache = new_cache(sites.model, LENGTH + 1)
    with masked(sites, plan):
        first = prefill(sites.model, ids[:, :PROMPT], cache)
        return torch.cat([first[:, None], forced(sites.model, ids[:, PROMPT:], cache, PROMPT)], dim=1)


def rewritten(sites: ModelSites, changes: dict[Unit, Callable]) -> nn.Module:
    """A copy of the model in which projections are replaced by edited ones."""
    model = copy.deepcopy(sites.model)
    for layer in resolve(model).layers:
        for unit, change in changes.items():
            projection = layer.projections[unit]
            parent, _, name = projection.path.rpartition(".")
            owner = projection.parent.get_submodule(parent) if parent else projection.parent
            setattr(owner, name, Edited(projection.module, change))
    return model


@pytest.mark.parametrize("family", dense_families)
def test_channel_thresholds_equal_projections_that_cut_their_input(family: str) -> None:
    sites, ids = resolve(tiny_model(family)), token_ids(2, LENGTH, seed=3)
    units = list(sites.layers[0].projections)
    values = {unit: 0.1 + 0.05 * index for index, unit in enumerate(units)}
    rules = {unit: ChannelRule(Threshold(value)) for unit, value in values.items()}
    found, plan = one_pass(sites, [LayerGates(channels=ChannelGate(rules))] * LAYERS, ids)
    changes = {u: lambda x, t=t: (torch.where(x.abs() >= t, x, 0.0), 0.0) for u, t in values.items()}
    with torch.no_grad():
        naive = rewritten(sites, changes)(input_ids=ids, use_cache=False).logits
        dense = sites.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)
    assert all(0 < share < 1 for unit in units for share in plan.kept_frac(unit))
    assert unit_widths(sites)[Unit.DOWN] == unit_widths(sites)[Unit.NEURON]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_counts_and_errors_of_channels_against_a_loop(family: str) -> None:
    sites, ids = resolve(tiny_model(family)), token_ids(1, LENGTH, seed=4)
    rules = {unit: ChannelRule(TopK(max(1, p.width // 3))) for unit, p in sites.layers[0].projections.items()}
    probe = MaskedPlan([LayerGates(channels=ChannelGate(rules))] * LAYERS, prompt_length=PROMPT, sink_tokens=2)
    inputs: dict[tuple[Unit, int], Tensor] = {}
    handles = [
        p.module.register_forward_pre_hook(lambda _m, args, at=(u, layer.index): inputs.update({at: args[0]}))
        for layer in sites.layers
        for u, p in layer.projections.items()
    ]
    with torch.no_grad():
        dense = sites.model(input_ids=ids, use_cache=False).logits
        with probed(sites, [probe]):
            assert torch.equal(sites.model(input_ids=ids, use_cache=False).logits, dense)
    for handle in handles:
        handle.remove()
    for (unit, layer), x in inputs.items():
        projection = sites.layers[layer].projections[unit]
        weight = projection.module.weight.T if projection.transposed else projection.module.weight
        ratios = []
        for row in x.reshape(LENGTH, -1)[PROMPT:]:
            top = row.abs().topk(max(1, projection.width // 3)).indices
            kept = torch.zeros_like(row).index_copy(0, top, row[top])
            ratios.append(float(((weight @ (row - kept)).norm() / (weight @ row).norm()).detach()))
        tally = probe.tally(unit, layer)
        assert tally.positions == LENGTH - PROMPT
        assert tally.kept == (LENGTH - PROMPT) * max(1, projection.width // 3)
        assert tally.mean_error == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_a_basis_and_a_correction_are_what_they_say() -> None:
    sites, ids = resolve(tiny_model("llama")), token_ids(2, LENGTH, seed=5)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    outer = torch.randn(HIDDEN, 3, generator=generator) * 0.1
    inner = torch.randn(HIDDEN, 3, generator=generator)
    rules = {
        Unit.Q: ChannelRule(TopK(8), basis=basis),
        Unit.O: ChannelRule(Threshold(0.2), correction=(outer, inner)),
    }
    found, _ = one_pass(sites, [LayerGates(channels=ChannelGate(rules))] * LAYERS, ids)

    def in_basis(x: Tensor) -> tuple[Tensor, float]:
        rotated = x @ basis
        order = rotated.abs().argsort(dim=-1, descending=True)[..., :8]
        return torch.zeros_like(rotated).scatter(-1, order, rotated.gather(-1, order)) @ basis.T, 0.0

    def corrected(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.where(x.abs() >= 0.2, x, 0.0)
        return kept, (x - kept) @ inner @ outer.T

    with torch.no_grad():
        naive = rewritten(sites, {Unit.Q: in_basis, Unit.O: corrected})(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "falcon"])
def test_heads_of_dropped_groups_add_nothing(family: str) -> None:
    sites, ids = resolve(tiny_model(family)), token_ids(2, LENGTH, seed=6)
    shape = shape_of(sites.model.config)
    width = unit_widths(sites)[Unit.O]
    generator = torch.Generator().manual_seed(2)
    router = Router(torch.randn(4, HIDDEN, generator=generator), torch.randn(shape.kv_heads, 4, generator=generator), 1)
    kept: list[Tensor] = []

    class Spy(nn.Module):
        """Keeps the router's choice at the input of the attention."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            kept.append((x @ router.first.T @ router.second.T).argmax(-1)[:, PROMPT:])
            return self.inner(x)

    def grouped(x: Tensor) -> tuple[Tensor, float]:
        group = torch.arange(width) // (width // shape.kv_heads)
        return x * (group == kept[-1][..., None]), 0.0

    found, plan = one_pass(sites, [LayerGates(heads=HeadGate(SiteKind.ATTN_IN, router))] * LAYERS, ids)
    model = rewritten(sites, {Unit.O: grouped})
    for layer in resolve(model).layers:
        setattr(layer.attention, layer.family.qkv[0], Spy(layer.qkv[0]))
    with torch.no_grad():
        naive = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=1e-4)
    assert plan.kept_frac(Unit.KV_GROUP) == [1 / shape.kv_heads] * LAYERS
    assert shape.kv_heads > 1


def test_a_fill_takes_the_place_of_dropped_neurons() -> None:
    sites, ids = resolve(tiny_model("llama")), token_ids(2, LENGTH, seed=7)
    fill = torch.linspace(-1, 1, FFN)
    gate = TokenGate(SiteKind.GATE, Threshold(0.3), fill=fill)
    found, plan = one_pass(sites, [LayerGates(neurons=gate)] * LAYERS, ids)
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.inner(x))
            return seen[-1]

    model = rewritten(sites, {Unit.DOWN: lambda a: (torch.where(seen[-1][:, PROMPT:].abs() >= 0.3, a, fill), 0.0)})
    for layer in resolve(model).layers:
        layer.mlp.act_fn = Watched(layer.mlp.act_fn)
    with torch.no_grad():
        naive = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=1e-4)
    assert all(0.1 < share < 0.9 for share in plan.kept_frac())


def test_ahead_reads_the_layer_before_and_the_first_layer_itself() -> None:
    sites, ids = resolve(make_model("llama", num_hidden_layers=3).double()), token_ids(2, LENGTH, seed=8)
    generator = torch.Generator().manual_seed(3)
    router = Router(
        torch.randn(6, HIDDEN, generator=generator).double(), torch.randn(FFN, 6, generator=generator).double(), 20
    )
    gates = [LayerGates(neurons=TokenGate(SiteKind.MLP_IN, router, ahead=1))] * 3
    found, _ = one_pass(sites, gates, ids)
    inputs: list[Tensor] = []

    class Recorded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            inputs.append(x)
            return self.inner(x)

    def routed(a: Tensor) -> tuple[Tensor, float]:
        read = inputs[max(0, len(inputs) - 2)][:, PROMPT:]
        top = (read @ router.first.T @ router.second.T).topk(20).indices
        return torch.zeros_like(a).scatter(-1, top, a.gather(-1, top)), 0.0

    model = rewritten(sites, {Unit.DOWN: routed})
    for layer in model.model.layers:
        layer.mlp = Recorded(layer.mlp)
    with torch.no_grad():
        naive = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(step_by_step(sites, gates, ids), found[:, PROMPT - 1 :], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_a_refresh_runs_a_token_dense_and_chooses_again(every: int) -> None:
    sites, ids = resolve(make_model("llama").double()), token_ids(2, LENGTH, seed=9)
    gate = PrefillGate(PromptStatistic, lambda s: s >= s.median(), refresh_every=every)
    found, plan = one_pass(sites, [LayerGates(neurons=gate)] * LAYERS, ids)

    class Naive(nn.Module):
        """One row after the other, with a statistic of its own."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, a: Tensor) -> Tensor:
            out = a.clone()
            for b in range(a.shape[0]):
                statistic = PromptStatistic()
                statistic.add(a[b, 2:PROMPT])
                mask = statistic.value() >= statistic.value().median()
                for t in range(PROMPT, a.shape[1]):
                    if (t - PROMPT + 1) % every == 0:
                        statistic.add(a[b, t : t + 1])
                        mask = statistic.value() >= statistic.value().median()
                    else:
                        out[b, t] = a[b, t] * mask
            return self.inner(out)

    model = copy.deepcopy(sites.model)
    for layer in model.model.layers:
        layer.mlp.down_proj = Naive(layer.mlp.down_proj)
    with torch.no_grad():
        naive = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-8, rtol=1e-8)
    steps = step_by_step(sites, [LayerGates(neurons=gate)] * LAYERS, ids)
    torch.testing.assert_close(steps, found[:, PROMPT - 1 :], atol=1e-8, rtol=1e-8)
    dense = (LENGTH - PROMPT) // every / (LENGTH - PROMPT)
    assert plan.kept_frac() == pytest.approx([dense + (1 - dense) * 25 / FFN] * LAYERS)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_every_part_at_once_token_by_token_is_one_pass_in_float64(family: str) -> None:
    sites, ids = resolve(make_model(family).double()), token_ids(2, LENGTH, seed=10)
    rules = {unit: ChannelRule(Threshold(0.15)) for unit in sites.layers[0].projections}
    kv_heads = unit_widths(sites)[Unit.KV_GROUP]
    generator = torch.Generator().manual_seed(4)
    router = Router(
        torch.randn(4, HIDDEN, generator=generator).double(), torch.randn(kv_heads, 4, generator=generator).double(), 1
    )
    gates = [
        LayerGates(
            neurons=TokenGate(SiteKind.GATE, Threshold(0.1)),
            channels=ChannelGate(rules),
            heads=HeadGate(SiteKind.ATTN_IN, router),
        )
    ] * LAYERS
    found, plan = one_pass(sites, gates, ids)
    torch.testing.assert_close(step_by_step(sites, gates, ids), found[:, PROMPT - 1 :], atol=1e-8, rtol=1e-8)
    assert {unit for unit, _ in plan.tallies} == {Unit.NEURON, Unit.KV_GROUP, *rules}


def test_generation_applies_every_part_and_says_why_it_is_not_sliced() -> None:
    sites, ids = resolve(make_model("llama").double()), token_ids(1, LENGTH, seed=11)
    mask = torch.arange(FFN) % 2 == 0
    fixed = LayerGates(neurons=FixedGate(mask))
    channels = LayerGates(channels=ChannelGate({Unit.DOWN: ChannelRule(Threshold(0.2))}))
    for gates, reason in (
        (fixed, None),
        (channels, "more than neurons"),
        (replace(fixed, channels=channels.channels), "more than neurons"),
        (LayerGates(neurons=FixedGate(mask, fill=torch.ones(FFN))), "fills in"),
        (LayerGates(neurons=TokenGate(SiteKind.GATE, Threshold(0.2))), "token by token"),
        (LayerGates(neurons=PrefillGate(PromptStatistic, lambda s: s > 0, refresh_every=2)), "chooses again"),
    ):
        found = why_not_sliced([gates] * LAYERS)
        assert found is None if reason is None else reason in str(found)
        with torch.no_grad(), sparse_generation(sites, [gates] * LAYERS, sink_tokens=2):
            cache = new_cache(sites.model, LENGTH + 1)
            prefill(sites.model, ids[:, :PROMPT], cache)
            steps = forced(sites.model, ids[:, PROMPT:], cache, PROMPT)
        expected, _ = one_pass(sites, [gates] * LAYERS, ids)
        torch.testing.assert_close(steps, expected[:, PROMPT:], atol=1e-8, rtol=1e-8)
