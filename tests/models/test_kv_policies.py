"""KV policies against a model written as loops over tokens, heads and cached positions, in float64."""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import HEADS, LAYERS, make_model, tiny_model, token_ids
from torch import Tensor
from transformers import DynamicCache

from actsparse.errors import ModelError
from actsparse.models.attention import FLUSH_EVERY, KvRule, LayerState, kv_policies
from actsparse.models.families import FAMILIES
from actsparse.models.sites import LayerSites, ModelSites, resolve
from actsparse.models.taps import tapped
from actsparse.results import KvPolicy, Site, SiteKind

GROUPS, P, LENGTH = 2, 4, 13
every_policy = pytest.mark.parametrize("policy", list(KvPolicy))
SERVED = [name for name, row in FAMILIES.items() if row.attention_interface]

Chooser = Callable[[int, int, Tensor], Tensor]
"""(layer, position, outputs of every head [heads, head_dim]) -> kept groups [groups]."""


def fixed_masks(batch: int, length: int, groups: int, seed: int = 0) -> Tensor:
    """Kept groups [layers, batch, positions, groups]; about half of them, runs of both kinds."""
    draw = torch.rand(LAYERS, batch, length, groups, generator=torch.Generator().manual_seed(seed))
    return draw > 0.55


def output_matrix(layer: LayerSites) -> Tensor:
    return layer.output.get_parameter("weight")


def group_norms(layer: LayerSites, o: Tensor) -> Tensor:
    """||sum over the heads of a group of W_o,h o_h|| of every group, from head outputs [heads, head_dim]."""
    head_dim = o.shape[1]
    norms = []
    for group in range(GROUPS):
        total = torch.zeros(output_matrix(layer).shape[0], dtype=o.dtype)
        for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
            total += output_matrix(layer)[:, head * head_dim : (head + 1) * head_dim] @ o[head]
        norms.append(total.norm())
    return torch.stack(norms)


# the reference


def rope(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    half = len(x) // 2
    cos, sin = (one[:half] for one in turn)
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


class NaiveAttention:
    """One layer's attention, token by token; an entry of the cache is (key, value) or None where there is none."""

    def __init__(
        self, layer: LayerSites, turns: list[tuple[Tensor, Tensor]], policy: KvPolicy, choose: Chooser
    ) -> None:
        self.layer, self.turns, self.policy, self.choose = layer, turns, policy, choose
        self.cache: list[list[tuple[Tensor, Tensor] | None]] = [[] for _ in range(GROUPS)]
        self.inputs: list[Tensor] = []

    def entry(self, group: int, position: int) -> tuple[Tensor, Tensor]:
        attention, x = self.layer.attention, self.inputs[position]
        size = attention.head_dim
        rows = slice(group * size, (group + 1) * size)
        key = attention.k_proj.weight[rows] @ x
        return rope(key, self.turns[position]), attention.v_proj.weight[rows] @ x

    def head(self, head: int, position: int, entries: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        attention = self.layer.attention
        size = attention.head_dim
        query = attention.q_proj.weight[head * size : (head + 1) * size] @ self.inputs[position]
        query = rope(query, self.turns[position])
        seen = [one for one in entries if one is not None]
        logits = torch.stack([query @ key / size**0.5 for key, _ in seen])
        weights = logits.softmax(dim=0)
        return sum(weight * value for weight, (_, value) in zip(weights, seen, strict=True))

    def step(self, x: Tensor, position: int) -> Tensor:
        self.inputs.append(x)
        outputs = []
        for group in range(GROUPS):
            looked = [
                self.entry(group, j) if one is None and self.policy is KvPolicy.LAZY else one
                for j, one in enumerate(self.cache[group])
            ]
            entries = [*looked, self.entry(group, position)]
            heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            outputs += [self.head(head, position, entries) for head in heads]
        o = torch.stack(outputs)
        kept = self.choose(self.layer.index, position, o) if position >= P else torch.ones(GROUPS, dtype=torch.bool)
        for group in range(GROUPS):
            entry = self.left(group, position, bool(kept[group]))
            self.cache[group].append(entry)
        o = o * kept.repeat_interleave(HEADS // GROUPS)[:, None]
        return output_matrix(self.layer) @ o.flatten()

    def left(self, group: int, position: int, kept: bool) -> tuple[Tensor, Tensor] | None:
        if kept and self.policy is KvPolicy.LAZY:
            self.cache[group] = [one or self.entry(group, j) for j, one in enumerate(self.cache[group])]
        if kept or self.policy is KvPolicy.COMPUTE_ALL:
            return self.entry(group, position)
        if self.policy is KvPolicy.ZERO:
            key, value = self.entry(group, position)
            return key * 0, value * 0
        return self.cache[group][-1] if self.policy is KvPolicy.COPY_PREV else None


def naive_logits(sites: ModelSites, ids: Tensor, policy: KvPolicy, choose: Chooser) -> Tensor:
    """Logits [positions, vocabulary] of one sequence of a Llama."""
    model, inner = sites.model, sites.model.get_submodule("model")
    # norms and rotary angles are the model's own: they are computed in float32 there, and are no part of a policy
    angles = inner.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(len(ids))[None])
    turns = list(zip(*(one[0] for one in angles), strict=True))
    layers = [NaiveAttention(layer, turns, policy, choose) for layer in sites.layers]
    rows = []
    for position, token in enumerate(ids.tolist()):
        x = inner.embed_tokens.weight[token]
        for naive in layers:
            block = naive.layer.block
            x = x + naive.step(block.input_layernorm(x), position)
            x = x + block.mlp(block.post_attention_layernorm(x))
        rows.append(model.lm_head.weight @ inner.norm(x))
    return torch.stack(rows)


# the model under a policy


class Masking:
    """Gives the masks of each pass to the policy, and zeroes the outputs of dropped groups."""

    def __init__(self, sites: ModelSites, masks: Tensor | None = None, oracle: Chooser | None = None) -> None:
        self.sites, self.masks, self.oracle = sites, masks, oracle
        self.start = dict.fromkeys(range(LAYERS), 0)

    def rule(self, layer: int, policy: KvPolicy) -> KvRule:
        def choose(outputs: Tensor | None, places: slice) -> Tensor:
            return self.kept(layer, outputs, places)

        return KvRule(policy, choose, needs_outputs=self.oracle is not None)

    def kept(self, layer: int, outputs: Tensor | None, places: slice) -> Tensor:
        first = self.start[layer] + places.start
        if self.masks is not None:
            assert outputs is None
            return self.masks[layer][:, first : self.start[layer] + places.stop]
        assert outputs is not None
        assert self.oracle is not None
        heads = outputs.view(*outputs.shape[:2], HEADS, -1)
        rows = [[self.oracle(layer, first + j, o) for j, o in enumerate(sequence)] for sequence in heads]
        return torch.stack([torch.stack(row) for row in rows])

    def zero(self, site: Site, x: Tensor) -> Tensor:
        start = self.start[site.layer]
        sparse = slice(max(0, P - start), x.shape[1])
        edited = x.clone()
        if sparse.start < sparse.stop:
            outputs = None if self.oracle is None else x[:, sparse]
            kept = self.kept(site.layer, outputs, sparse)
            wide = kept.repeat_interleave(x.shape[-1] // kept.shape[-1], dim=-1)
            edited[:, sparse] = torch.where(wide, x[:, sparse], 0.0)
        self.start[site.layer] += x.shape[1]
        return edited


@contextmanager
def under(sites: ModelSites, policy: KvPolicy, masking: Masking):
    rules = {layer.index: masking.rule(layer.index, policy) for layer in sites.layers}
    with ExitStack() as stack:
        states = stack.enter_context(kv_policies(sites, rules, prompt_length=P))
        stack.enter_context(tapped(sites, {SiteKind.ATTN_OUT: masking.zero}))
        stack.enter_context(torch.no_grad())
        yield states


def passes(sites: ModelSites, ids: Tensor, cuts: list[int], **inputs: Tensor) -> Tensor:
    """Logits of consecutive passes on one cache, cut at these positions; one pass without a cache when not cut."""
    model: Any = sites.model
    if not cuts:
        return model(input_ids=ids, use_cache=False, **inputs).logits
    cache = DynamicCache(config=model.config)
    bounds = [0, *cuts, ids.shape[1]]
    found = []
    for start, stop in pairwise(bounds):
        part = {name: x[:, :stop] if name == "attention_mask" else x[:, start:stop] for name, x in inputs.items()}
        found.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **part).logits)
    return torch.cat(found, dim=1)


STEPS = list(range(P, LENGTH))
CUTS = {"one pass": [], "prompt, then token by token": STEPS, "in chunks": [2, 7, 8]}


@every_policy
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("oracle", [False, True], ids=["known before", "oracle"])
def test_a_policy_equals_the_loops(policy: KvPolicy, cuts: list[int], oracle: bool) -> None:
    sites = resolve(make_model("llama").double())
    ids = token_ids(1, LENGTH, seed=1)
    masks = fixed_masks(1, LENGTH, GROUPS)

    def largest(layer: int, position: int, o: Tensor) -> Tensor:
        norms = group_norms(sites.layers[layer], o)
        return norms == norms.max()

    chooser: Chooser = largest if oracle else lambda layer, position, o: masks[layer][0, position]
    with torch.no_grad():
        naive = naive_logits(sites, ids[0], policy, chooser)
    masking = Masking(sites, oracle=largest) if oracle else Masking(sites, masks)
    with under(sites, policy, masking):
        found = passes(sites, ids, cuts)[0]
    torch.testing.assert_close(found, naive, atol=1e-10, rtol=1e-10)


def test_policies_differ_where_they_must() -> None:
    sites = resolve(make_model("llama").double())
    ids, masks = token_ids(1, LENGTH, seed=1), fixed_masks(1, LENGTH, GROUPS)
    found = {}
    for policy in KvPolicy:
        with under(sites, policy, Masking(sites, masks)):
            found[policy] = passes(sites, ids, [])
    torch.testing.assert_close(found[KvPolicy.LAZY], found[KvPolicy.COMPUTE_ALL], atol=1e-10, rtol=1e-10)
    others = [KvPolicy.COMPUTE_ALL, KvPolicy.DROP, KvPolicy.ZERO, KvPolicy.COPY_PREV]
    for one in others:
        for other in others:
            assert one is other or (found[one] - found[other]).abs().max() > 1e-3


@every_policy
@pytest.mark.parametrize("family", SERVED)
def test_token_by_token_equals_one_pass(family: str, policy: KvPolicy) -> None:
    changes = {"sliding_window": 6} if family in ("mistral", "gemma2", "gemma3_text") else {}
    sites = resolve(make_model(family, **changes).double())
    if sites.moe_layers:
        sites.model.set_experts_implementation("eager")  # the grouped product knows no float64
    groups = getattr(sites.model.config, "num_key_value_heads", HEADS)
    ids, masks = token_ids(2, LENGTH, seed=2), fixed_masks(2, LENGTH, groups, seed=3)
    with under(sites, policy, Masking(sites, masks)):
        whole = passes(sites, ids, [])
    with under(sites, policy, Masking(sites, masks)):
        steps = passes(sites, ids, STEPS)
    torch.testing.assert_close(steps, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", SERVED)
def test_a_rule_that_keeps_all_is_dense_bit_for_bit(family: str) -> None:
    sites = resolve(tiny_model(family))
    ids = token_ids(2, LENGTH, seed=4)
    with torch.no_grad():
        dense, steps = passes(sites, ids, []), passes(sites, ids, STEPS)
    before = sites.model.config._attn_implementation
    rule = KvRule(KvPolicy.DROP, lambda _o, places: torch.ones(2, places.stop - places.start, 1, dtype=torch.bool))
    rules = dict.fromkeys(range(LAYERS), rule)
    with torch.no_grad(), kv_policies(sites, rules, prompt_length=P):
        assert torch.equal(passes(sites, ids, []), dense)
    with torch.no_grad(), kv_policies(sites, rules, prompt_length=P):
        assert torch.equal(passes(sites, ids, STEPS), steps)
    assert sites.model.config._attn_implementation == before
    with torch.no_grad():
        assert torch.equal(passes(sites, ids, []), dense)


@every_policy
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_a_left_padded_batch_equals_its_sequences(family: str, policy: KvPolicy) -> None:
    # Gemma 2's own attention takes the softmax in float32, where a float64 mask overflows
    wide = family != "gemma2"
    sites, near = resolve(make_model(family).to(torch.float64 if wide else torch.float32)), 1e-9 if wide else 1e-4
    masks = fixed_masks(2, LENGTH, GROUPS, seed=5)
    ids = token_ids(2, LENGTH, seed=6)
    pad = 3
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :pad] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with under(sites, policy, Masking(sites, masks)):
        both = passes(sites, ids, STEPS, attention_mask=mask, position_ids=positions)
    with under(sites, policy, Masking(sites, masks[:, 1:])):
        second = passes(sites, ids[1:], [])
    torch.testing.assert_close(both[1:], second, atol=near, rtol=near)
    alone = Masking(sites, masks[:, :1, pad:])
    rules = {layer.index: alone.rule(layer.index, policy) for layer in sites.layers}

    def zero(site: Site, x: Tensor) -> Tensor:
        kept = alone.masks[site.layer].clone()  # pyright: ignore[reportOptionalSubscript]
        kept[:, : P - pad] = True
        return torch.where(kept.repeat_interleave(x.shape[-1] // GROUPS, dim=-1), x, 0.0)

    with kv_policies(sites, rules, prompt_length=P - pad), tapped(sites, {SiteKind.ATTN_OUT: zero}), torch.no_grad():
        first = passes(sites, ids[:1, pad:], [])
    torch.testing.assert_close(both[:1, pad:], first, atol=near, rtol=near)


def never_kept(sites: ModelSites, policy: KvPolicy, cuts: list[int], length: int) -> dict[int, LayerState]:
    masks = torch.zeros(LAYERS, 1, length, GROUPS, dtype=torch.bool)
    with under(sites, policy, Masking(sites, masks)) as states:
        passes(sites, token_ids(1, length, seed=7), cuts)
    return states


def test_drop_leaves_holes_in_the_cache() -> None:
    sites = resolve(tiny_model("llama"))
    masks = fixed_masks(1, LENGTH, GROUPS, seed=8)
    model: Any = sites.model
    cache = DynamicCache(config=model.config)
    with under(sites, KvPolicy.DROP, Masking(sites, masks)) as states:
        model(input_ids=token_ids(1, LENGTH), past_key_values=cache)
    for index, state in states.items():
        expected = masks[index].transpose(1, 2).clone()
        expected[:, :, :P] = True
        assert state.present is not None
        assert torch.equal(state.present, expected)
        for stored in (cache.layers[index].keys, cache.layers[index].values):
            assert not stored[~expected].any()
            assert stored[expected].any(dim=-1).all()


def test_lazy_projects_at_the_next_use_and_at_every_sixteenth_step() -> None:
    sites = resolve(tiny_model("llama"))
    length = P + FLUSH_EVERY + 3
    steps = list(range(P, length))
    for cuts in ([], steps):
        states = never_kept(sites, KvPolicy.LAZY, cuts, length)
        for state in states.values():
            assert state.present is not None
            assert state.present[:, :, : P + FLUSH_EVERY].all()
            assert not state.present[:, :, P + FLUSH_EVERY :].any()
            assert state.projected == FLUSH_EVERY * GROUPS
    before = never_kept(sites, KvPolicy.LAZY, list(range(P, P + FLUSH_EVERY - 1)), P + FLUSH_EVERY - 1)
    assert all(state.projected == 0 for state in before.values())
    masks = torch.zeros(LAYERS, 1, P + 6, GROUPS, dtype=torch.bool)
    masks[:, :, P + 4, 1] = True
    with under(sites, KvPolicy.LAZY, Masking(sites, masks)) as found:
        passes(sites, token_ids(1, P + 6), list(range(P, P + 6)))
    for state in found.values():
        assert state.present is not None
        assert state.projected == 4
        assert state.present[0, :, P:].tolist() == [[False] * 6, [True] * 5 + [False]]


def test_lazy_keeps_no_more_inputs_than_it_needs() -> None:
    sites = resolve(tiny_model("llama"))
    states = never_kept(sites, KvPolicy.LAZY, list(range(P, P + 40)), P + 40)
    assert all(len(state._calls) < FLUSH_EVERY for state in states.values())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SERVED])
def test_other_families_are_refused_with_those_that_are_served(family: str) -> None:
    sites = resolve(tiny_model(family))
    with pytest.raises(ModelError, match=f"'{family}'") as caught, kv_policies(sites, {}, prompt_length=P):
        pass
    assert all(name in caught.value.hint for name in SERVED)
