"""Mixtures of experts against loops over tokens and experts: what their sites show, what edits do, what they cost."""

from typing import Any

import pytest
import torch
from tiny import EXPERTS, FFN, HIDDEN, SHARED, TOP_K, make_model, tiny_model, token_ids
from torch import Tensor, nn
from torch.nn import functional as F

from actsparse.models.cost import embedding_and_head, step_bytes
from actsparse.models.experts import IMPLEMENTATION, observed
from actsparse.models.families import FAMILIES
from actsparse.models.projections import MlpWeights
from actsparse.models.sites import LayerSites, resolve
from actsparse.models.taps import tapped
from actsparse.results import SHARED_EXPERT, Site, SiteKind

MOE = [name for name, row in FAMILIES.items() if row.experts is not None]
moe_families = pytest.mark.parametrize("family", MOE)
INSIDE = (SiteKind.GATE, SiteKind.UP, SiteKind.NEURON)


def naive_ffn(weights: MlpWeights, x: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """act(g), u, a and the output of one token, with every neuron times `factor`."""
    assert weights.gate is not None
    gate, up = F.silu(weights.gate @ x), weights.up @ x
    return gate, up, gate * up, weights.down @ (gate * up * factor)


def matrix(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach()


def naive_router(layer: LayerSites, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of one token, and the weights of the experts that it passes."""
    assert layer.experts is not None
    config = layer.attention.config
    logits = matrix(layer.experts.router) @ x
    probabilities = logits.softmax(dim=0).detach()
    chosen = probabilities.argsort(descending=True)[:TOP_K].tolist()
    normalise = getattr(config, "norm_topk_prob", True)
    total = sum(float(probabilities[e]) for e in chosen) if normalise else 1.0
    return logits, {e: probabilities[e] / total for e in chosen}


def naive_block(layer: LayerSites, x: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """The output of the experts' block for one token."""
    _, weights = naive_router(layer, x)
    out = torch.zeros(HIDDEN)
    for ffn in layer.ffns:
        if ffn.expert == SHARED_EXPERT:
            scale = torch.sigmoid(matrix(layer.mlp.get_submodule("shared_expert_gate")) @ x)
            out += scale * naive_ffn(ffn.weights(), x)[3]
        elif ffn.expert in weights:
            out += weights[ffn.expert] * naive_ffn(ffn.weights(), x, factor)[3]
    return out


def run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@moe_families
def test_each_expert_shows_the_tokens_that_the_router_sends_it(family: str) -> None:
    sites = resolve(tiny_model(family))
    layer, ids = sites.layers[-1], token_ids(2, 9, seed=1)
    seen: dict[Site, Tensor] = {}
    routed: dict[int | None, Tensor | None] = {}

    def look(site: Site, x: Tensor) -> None:
        seen[site] = x.clone()
        if site.kind is SiteKind.NEURON:
            routed[site.expert] = tap.routed

    with tapped(sites, dict.fromkeys((*INSIDE, SiteKind.MLP_IN, SiteKind.ROUTER), look), (layer.index,)) as tap:
        run(sites.model, ids)
    inputs = seen[Site(layer=layer.index, kind=SiteKind.MLP_IN)]
    for batch in range(2):
        for position in range(9):
            x = inputs[batch, position]
            logits, weights = naive_router(layer, x)
            shown = seen[Site(layer=layer.index, kind=SiteKind.ROUTER)][batch, position]
            torch.testing.assert_close(shown, logits, atol=1e-5, rtol=1e-5)
            for ffn in layer.ffns:
                passes = ffn.expert in weights or ffn.expert == SHARED_EXPERT
                mask = routed.get(ffn.expert)
                if mask is not None:
                    assert bool(mask[batch, position]) == passes
                for kind, naive in zip(INSIDE, naive_ffn(ffn.weights(), x), strict=False):
                    site = Site(layer=layer.index, kind=kind, expert=ffn.expert)
                    if passes:
                        torch.testing.assert_close(seen[site][batch, position], naive, atol=1e-5, rtol=1e-5)
                    elif site in seen:
                        assert not seen[site][batch, position].any()
    assert tap.routed is None


@moe_families
def test_an_edit_of_experts_reaches_the_output_as_the_formula_says(family: str) -> None:
    sites = resolve(tiny_model(family))
    layer, ids = sites.layers[-1], token_ids(2, 7, seed=2)
    factor = torch.arange(FFN) % 3 - 1.0
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def edit(site: Site, x: Tensor) -> Tensor | None:
        return None if site.expert == SHARED_EXPERT else x * factor

    def note(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    handle = layer.mlp.register_forward_hook(note)
    try:
        with tapped(sites, {SiteKind.NEURON: edit}, (layer.index,)):
            run(sites.model, ids)
    finally:
        handle.remove()
    with torch.no_grad():
        naive = torch.stack([naive_block(layer, x, factor) for x in inputs[0].reshape(-1, HIDDEN)])
    torch.testing.assert_close(outputs[0].reshape(-1, HIDDEN), naive, atol=1e-5, rtol=1e-5)


@moe_families
def test_one_token_and_batches_are_bit_identical_to_the_default(family: str) -> None:
    model = tiny_model(family)
    sites = resolve(model)
    experts = {layer.experts.module: lambda *_shown: None for layer in sites.layers if layer.experts is not None}
    for shape in ((1, 1), (3, 17)):
        ids = token_ids(*shape, seed=3)
        dense = run(model, ids)
        with observed(model, experts):
            assert model.config._experts_implementation == IMPLEMENTATION
            assert torch.equal(run(model, ids), dense)
        assert model.config._experts_implementation != IMPLEMENTATION


def test_a_dense_layer_among_mixtures_is_read_as_one() -> None:
    model = make_model("qwen2_moe", mlp_only_layers=[1])
    sites = resolve(model)
    assert sites.moe_layers == (0,)
    assert [(ffn.layer.index, ffn.expert) for ffn in sites.ffns] == [
        *((0, expert) for expert in range(EXPERTS)), (0, SHARED_EXPERT), (1, None)
    ]  # fmt: skip
    seen: dict[Site, Tensor] = {}
    with tapped(sites, {SiteKind.NEURON: lambda site, x: seen.update({site: x})}):
        run(model, token_ids(1, 5))
    assert seen[Site(layer=1, kind=SiteKind.NEURON)].shape == (1, 5, FFN)
    assert seen[Site(layer=0, kind=SiteKind.NEURON, expert=SHARED_EXPERT)].shape == (1, 5, SHARED)


@pytest.mark.parametrize(("changes", "dense_layers"), [({}, 0), ({"mlp_only_layers": [1]}, 1)])
def test_a_step_reads_the_experts_of_one_token(changes: dict[str, Any], dense_layers: int) -> None:
    sites = resolve(make_model("qwen2_moe", **changes))
    step = step_bytes(sites)
    matrix = FFN * HIDDEN * 4
    moe = 2 - dense_layers
    per_matrix = moe * (TOP_K * matrix + SHARED * HIDDEN * 4) + dense_layers * matrix
    assert step.mlp_total == 3 * per_matrix
    idle = moe * 3 * matrix * (EXPERTS - TOP_K)
    parameters = sum(p.numel() * p.element_size() for p in sites.model.parameters())
    embedding = embedding_and_head(sites)[0].numel() * 4
    assert step.total == parameters - embedding - idle
