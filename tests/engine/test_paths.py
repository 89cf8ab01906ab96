"""Masked activations, sliced weights and a model with zeroed columns are three names of one thing."""

import copy
from collections.abc import Sequence
from math import sqrt

import pytest
import torch
from tiny import LAYERS, WIDTHS, make_model, tiny_model, token_ids
from torch import Tensor, nn
from transformers import DynamicCache

from actsparse.engine.decode import forced, greedy, new_cache, prefill
from actsparse.engine.gating import GateState
from actsparse.engine.masked import MaskedPlan, masked, probed, relative_errors
from actsparse.engine.slicing import sliceable
from actsparse.engine.sparse import sparse_decoder
from actsparse.errors import PlanError
from actsparse.methods.base import Fit
from actsparse.methods.gates import Custom, FixedGate, LayerGates, NeuronGate, PrefillGate, Threshold, TokenGate
from actsparse.methods.griffin import Griffin
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.methods.tda import Tda
from actsparse.models.families import FAMILIES
from actsparse.models.sites import ModelSites, resolve
from actsparse.models.taps import tapped
from actsparse.results import LayerPlan, Site, SiteKind, Unit

PROMPT, LENGTH = 7, 15
every_family = pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.experts is None])


def masks_of(width: int, name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = {
        "half": lambda: torch.rand(width, generator=generator) < 0.5,
        "one": lambda: torch.arange(width) == int(torch.randint(width, (1,), generator=generator)),
        "all": lambda: torch.ones(width, dtype=torch.bool),
        "last": lambda: torch.arange(width) >= width - 3,
    }
    return [made[name]() for _ in range(LAYERS)]


def without_neurons(sites: ModelSites, masks: Sequence[Tensor]) -> nn.Module:
    """A copy of the model in which the dropped neurons' columns of the down projection are zero."""
    pruned = copy.deepcopy(sites.model)
    for layer, mask in zip(resolve(pruned).layers, masks, strict=True):
        weight = layer.down.weight.data
        if layer.family.transposed:
            weight[~mask] = 0
        else:
            weight[:, ~mask] = 0
    return pruned


def naive_decode(sites: ModelSites, masks: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Logits of positions PROMPT.. : dense prompt, then the pruned copy on the same cache, in one pass."""
    cache = DynamicCache(config=sites.model.config)
    with torch.no_grad():
        sites.model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        positions = torch.arange(PROMPT, ids.shape[1])[None].expand(len(ids), -1)
        pruned = without_neurons(sites, masks)
        return pruned(input_ids=ids[:, PROMPT:], position_ids=positions, past_key_values=cache, use_cache=True).logits


def layers_of(gates: Sequence[NeuronGate]) -> list[LayerGates]:
    return [LayerGates(neurons=gate) for gate in gates]


def in_one_pass(
    sites: ModelSites, gates: Sequence[NeuronGate], ids: Tensor, sink: int = 2
) -> tuple[Tensor, MaskedPlan]:
    plan = MaskedPlan(layers_of(gates), prompt_length=PROMPT, sink_tokens=sink)
    with masked(sites, plan), torch.no_grad():
        return sites.model(input_ids=ids, use_cache=False).logits, plan


def token_by_token(sites: ModelSites, gates: Sequence[NeuronGate], ids: Tensor, sink: int = 2) -> Tensor:
    plan = MaskedPlan(layers_of(gates), prompt_length=PROMPT, sink_tokens=sink)
    cache = new_cache(sites.model, LENGTH + 1)
    with masked(sites, plan):
        first = prefill(sites.model, ids[:, :PROMPT], cache)
        return torch.cat([first[:, None], forced(sites.model, ids[:, PROMPT:], cache, PROMPT)], dim=1)


def sliced(sites: ModelSites, gates: Sequence[NeuronGate], ids: Tensor, sink: int = 2) -> tuple[Tensor, list[Tensor]]:
    with sparse_decoder(sites, layers_of(gates), sink_tokens=sink) as decoder:
        cache = new_cache(sites.model, LENGTH + 1)
        decoder.prefill(ids[:, :PROMPT], cache)
        decoder.select()
        return forced(sites.model, ids[:, PROMPT:], cache, PROMPT), decoder.masks


def prompt_activations(sites: ModelSites, ids: Tensor) -> list[Tensor]:
    """a [batch, seq, neurons] of every layer, dense."""
    found: dict[int, Tensor] = {}

    def keep(site: Site, a: Tensor) -> None:
        found[site.layer] = a.clone()

    with tapped(sites, {SiteKind.NEURON: keep}), torch.no_grad():
        sites.model(input_ids=ids, use_cache=False)
    return [found[layer] for layer in range(LAYERS)]


def naive_statistic(a: Tensor) -> Tensor:
    """s of prompt rows [tokens, neurons], one row at a time."""
    total, used = torch.zeros(a.shape[1], dtype=torch.float64), 0
    for row in a.double():
        if row.norm() > 0:
            total += (row / row.norm()) ** 2
            used += 1
    return (total / used).sqrt()


def griffin_gates(width: int, kept: int) -> list[NeuronGate]:
    layers = tuple(LayerPlan(layer=i, width=width, kept=kept) for i in range(LAYERS))
    fit = Fit(layers=layers, predicted_drop=(0.5,) * LAYERS)
    return [Griffin().gates(i, fit).neurons for i in range(LAYERS)]


@every_family
@pytest.mark.parametrize("name", ["half", "one", "last"])
def test_sliced_masked_and_zeroed_weights_agree(family: str, name: str) -> None:
    sites = resolve(tiny_model(family))
    masks = masks_of(WIDTHS[family], name)
    gates = [FixedGate(mask) for mask in masks]
    ids = token_ids(1, LENGTH, seed=11)
    naive = naive_decode(sites, masks, ids)
    dense = sites.model(input_ids=ids, use_cache=False).logits[:, PROMPT:].detach()
    assert float((naive - dense).abs().max()) > 1e-3
    torch.testing.assert_close(sliced(sites, gates, ids)[0], naive, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_one_pass(sites, gates, ids)[0][:, PROMPT:], naive, atol=1e-4, rtol=0)


@every_family
def test_all_neurons_sliced_is_dense(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids = token_ids(1, LENGTH, seed=12)
    with torch.no_grad():
        dense = sites.model(input_ids=ids, use_cache=False).logits[:, PROMPT:]
    found, _ = sliced(sites, [FixedGate(mask) for mask in masks_of(WIDTHS[family], "all")], ids)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=0)


@every_family
def test_sliceable_puts_every_module_back(family: str) -> None:
    sites = resolve(make_model(family))
    modules, bits = dict(sites.model.named_modules()), {k: v.clone() for k, v in sites.model.state_dict().items()}
    ids = token_ids(1, LENGTH)
    with torch.no_grad():
        dense = sites.model(input_ids=ids, use_cache=False).logits
    sliced(sites, griffin_gates(WIDTHS[family], 5), ids)

    def fail() -> None:
        with sliceable(sites) as mlps:
            mlps.keep(masks_of(WIDTHS[family], "half"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    after = dict(sites.model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert all(torch.equal(value, bits[name]) for name, value in sites.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(sites.model(input_ids=ids, use_cache=False).logits, dense)


@every_family
def test_token_by_token_equals_one_pass(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids = token_ids(2, LENGTH, seed=13)
    gates = griffin_gates(WIDTHS[family], WIDTHS[family] // 2)
    whole, _ = in_one_pass(sites, gates, ids)
    steps = token_by_token(sites, gates, ids)
    difference = whole[:, PROMPT - 1 :].log_softmax(-1) - steps.log_softmax(-1)
    assert float(difference.abs().max()) < 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_a_token_gate_token_by_token_equals_one_pass_in_float64(family: str) -> None:
    sites = resolve(make_model(family).double())
    ids = token_ids(2, LENGTH, seed=14)
    gate = TokenGate(SiteKind.GATE, Threshold(0.2))
    whole, plan = in_one_pass(sites, [gate] * LAYERS, ids)
    assert all(0.1 < kept < 0.9 for kept in plan.kept_frac())
    torch.testing.assert_close(token_by_token(sites, [gate] * LAYERS, ids), whole[:, PROMPT - 1 :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_token_gate_equals_a_naive_layer(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids, threshold = token_ids(1, LENGTH, seed=15), 0.3
    gate = TokenGate(SiteKind.GATE, Threshold(threshold))
    found, plan = in_one_pass(sites, [gate] * LAYERS, ids)
    kept: list[float] = []

    # the same rule written into the activation functions of the model itself
    class Cut(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            value = self.inner(x)
            keep = (value.abs() >= threshold) | (torch.arange(value.shape[1]) < PROMPT)[None, :, None]
            kept.append(float(keep[:, PROMPT:].float().mean()))
            return value * keep

    model = copy.deepcopy(sites.model)
    for layer in resolve(model).layers:
        setattr(layer.mlp, layer.family.activation, Cut(layer.activation))
    with torch.no_grad():
        naive = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-5)
    assert plan.kept_frac() == pytest.approx(kept)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_griffin_keeps_what_a_naive_selection_keeps(family: str) -> None:
    sites, width, sink = resolve(tiny_model(family)), WIDTHS[family], 2
    ids = token_ids(1, LENGTH, seed=16)
    acts = prompt_activations(sites, ids[:, :PROMPT])
    _, masks = sliced(sites, griffin_gates(width, 9), ids, sink)
    for a, mask in zip(acts, masks, strict=True):
        naive = sorted(naive_statistic(a[0, sink:]).topk(9).indices.tolist())
        assert mask.nonzero().squeeze(1).tolist() == naive


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_tda_keeps_what_a_naive_selection_keeps(family: str) -> None:
    sites, width, sink = resolve(tiny_model(family)), WIDTHS[family], 2
    ids = token_ids(1, LENGTH, seed=17)
    layers = tuple(LayerPlan(layer=i, width=width, threshold=0.8 + 0.2 * i) for i in range(LAYERS))
    fit = Fit(layers=layers, predicted_drop=(0.5,) * LAYERS)
    _, masks = sliced(sites, [Tda().gates(i, fit).neurons for i in range(LAYERS)], ids, sink)
    for a, mask, layer in zip(prompt_activations(sites, ids[:, :PROMPT]), masks, layers, strict=True):
        naive = naive_statistic(a[0, sink:]) * sqrt(width) >= layer.threshold
        assert torch.equal(mask, naive)
        assert 0 < int(mask.sum()) < width


def test_tda_keeps_the_strongest_neuron_where_none_is_over_the_threshold() -> None:
    fit = Fit(layers=(LayerPlan(layer=0, width=4, threshold=100.0),), predicted_drop=(0.5,))
    gate = Tda().gates(0, fit).neurons
    assert isinstance(gate, PrefillGate)
    assert gate.rule(torch.tensor([0.1, 0.4, 0.3, 0.2])).tolist() == [False, True, False, False]


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_a_prompt_no_longer_than_the_sink_keeps_everything(prompt: int) -> None:
    sites, width = resolve(tiny_model("llama")), WIDTHS["llama"]
    ids = token_ids(1, LENGTH, seed=18)
    with sparse_decoder(sites, layers_of(griffin_gates(width, 4)), sink_tokens=3) as decoder:
        cache = new_cache(sites.model, LENGTH)
        decoder.prefill(ids[:, :prompt], cache)
        decoder.select()
        assert [int(mask.sum()) for mask in decoder.masks] == [width] * LAYERS
        found = forced(sites.model, ids[:, prompt:], cache, prompt)
    plan = MaskedPlan(layers_of(griffin_gates(width, 4)), prompt_length=prompt, sink_tokens=3)
    with torch.no_grad():
        dense = sites.model(input_ids=ids, use_cache=False).logits
        with masked(sites, plan):
            assert torch.equal(sites.model(input_ids=ids, use_cache=False).logits, dense)
    torch.testing.assert_close(found, dense[:, prompt:], atol=1e-4, rtol=0)


def test_one_token_after_the_sink_is_enough_to_choose() -> None:
    sites, width = resolve(tiny_model("llama")), WIDTHS["llama"]
    with sparse_decoder(sites, layers_of(griffin_gates(width, 4)), sink_tokens=3) as decoder:
        decoder.prefill(token_ids(1, 4), new_cache(sites.model, LENGTH))
        decoder.select()
        assert [int(mask.sum()) for mask in decoder.masks] == [4] * LAYERS


def test_nothing_of_one_sequence_is_left_for_the_next() -> None:
    sites, width = resolve(tiny_model("llama")), WIDTHS["llama"]
    first, second = token_ids(1, LENGTH, seed=19), token_ids(1, LENGTH, seed=20)

    def masks(decoder: object, ids: Tensor) -> list[list[bool]]:
        decoder.prefill(ids, new_cache(sites.model, LENGTH + 1))
        decoder.select()
        return [mask.tolist() for mask in decoder.masks]

    with sparse_decoder(sites, layers_of(griffin_gates(width, 9)), sink_tokens=2) as decoder:
        alone = masks(decoder, second)
    with sparse_decoder(sites, layers_of(griffin_gates(width, 9)), sink_tokens=2) as decoder:
        other = masks(decoder, first)
        after = masks(decoder, second)
    assert after == alone
    assert other != alone


def test_prefill_is_dense_again_after_a_sparse_text() -> None:
    sites = resolve(tiny_model("llama"))
    ids = token_ids(1, LENGTH, seed=21)
    dense = prefill(sites.model, ids, new_cache(sites.model, LENGTH))
    with sparse_decoder(sites, layers_of(griffin_gates(WIDTHS["llama"], 4)), sink_tokens=2) as decoder:
        decoder.prefill(ids, new_cache(sites.model, LENGTH))
        decoder.select()
        assert torch.equal(decoder.prefill(ids, new_cache(sites.model, LENGTH)), dense)


def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    sites, width = resolve(tiny_model("llama")), WIDTHS["llama"]
    ids = token_ids(2, LENGTH, seed=22)
    both, plan = in_one_pass(sites, griffin_gates(width, 9), ids)
    assert not torch.equal(plan.state.neurons[0].chosen()[0], plan.state.neurons[0].chosen()[1])
    for i in range(2):
        one, _ = in_one_pass(sites, griffin_gates(width, 9), ids[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-5, rtol=0)


def test_a_token_gate_has_no_engine() -> None:
    sites = resolve(tiny_model("llama"))
    gate = TokenGate(SiteKind.GATE, Custom(lambda x: x.abs() > 0))
    with (
        pytest.raises(PlanError, match="token by token"),
        sparse_decoder(sites, layers_of([gate] * LAYERS), sink_tokens=2),
    ):
        pass


def test_relative_errors_against_one_token_at_a_time() -> None:
    generator = torch.Generator().manual_seed(1)
    a, down = torch.randn(2, 5, 6, generator=generator), torch.randn(3, 6, generator=generator)
    mask = torch.rand(2, 5, 6, generator=generator) < 0.6
    a[1, 2] = 0
    found = relative_errors(a, mask, down)
    for b in range(2):
        for t in range(5):
            y, kept = down @ a[b, t], down @ (a[b, t] * mask[b, t])
            naive = float((y - kept).norm() / y.norm()) if y.norm() > 0 else 0.0
            assert float(found[b, t]) == pytest.approx(naive, rel=1e-4, abs=1e-6)


def test_probed_counts_and_leaves_the_pass_dense() -> None:
    sites, width = resolve(tiny_model("llama")), WIDTHS["llama"]
    ids = token_ids(1, LENGTH, seed=23)
    masks = masks_of(width, "half")
    plan = MaskedPlan(layers_of([FixedGate(mask) for mask in masks]), prompt_length=PROMPT, sink_tokens=2)
    with torch.no_grad():
        dense = sites.model(input_ids=ids, use_cache=False).logits
        with probed(sites, [plan]):
            assert torch.equal(sites.model(input_ids=ids, use_cache=False).logits, dense)
    assert plan.kept_frac() == pytest.approx([float(mask.float().mean()) for mask in masks])
    for layer, a in enumerate(prompt_activations(sites, ids)):
        weights = sites.layers[layer].mlp_weights()
        y = a[0, PROMPT:] @ weights.down.T
        dropped = (a[0, PROMPT:] * ~masks[layer]) @ weights.down.T
        naive = (dropped.norm(dim=1) / y.norm(dim=1)).sum()
        assert plan.tally(Unit.NEURON, layer).errors == pytest.approx(float(naive.detach()), rel=1e-4)


def test_a_gate_state_ignores_sink_tokens_and_what_follows_the_prompt() -> None:
    a = torch.rand(1, 10, 6, generator=torch.Generator().manual_seed(2))
    state = GateState(PrefillGate(PromptStatistic, lambda s: s >= s.median()), prompt_length=6, sink_tokens=2)
    state.observe(a[:, :3], 0)
    state.observe(a[:, 3:], 3)
    naive = naive_statistic(a[0, 2:6])
    assert torch.equal(state.chosen()[0], naive >= naive.median())


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "opt"])
def test_greedy_continues_as_the_argmax_of_whole_passes(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids = token_ids(1, PROMPT, seed=24)
    cache = new_cache(sites.model, LENGTH)
    text = greedy(sites.model, prefill(sites.model, ids, cache), cache, PROMPT, 5)
    naive = ids
    with torch.no_grad():
        for _ in range(5):
            naive = torch.cat([naive, sites.model(input_ids=naive).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert text.tolist() == naive[:, PROMPT:].tolist()
    stopped = greedy(sites.model, prefill(sites.model, ids, new := new_cache(sites.model, LENGTH)), new, PROMPT, 5,
                     lambda token: int(token) == int(text[0, 1]))  # fmt: skip
    assert stopped.shape[1] <= 2
