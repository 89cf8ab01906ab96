"""Runs as the commands open them, on the GPU: a step of our own, or the model's own forward in a CUDA graph."""

import copy
import warnings

import pytest
import torch
from tiny import make_model, token_ids

from actsparse.engine import stepping
from actsparse.engine.choose import Engines
from actsparse.engine.decode import forced, new_cache, prefill
from actsparse.engine.generation import sparse_generation
from actsparse.engine.kept import NO_GAIN
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import (
    ChannelGate,
    ChannelRule,
    FixedGate,
    LayerGates,
    PrefillGate,
    Threshold,
    TokenGate,
    TopK,
)
from actsparse.models.sites import resolve
from actsparse.results import SiteKind, Unit

pytestmark = pytest.mark.gpu
PROMPT, NEW, SINK, ROOM = 24, 12, 2, 64
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TIER_2 = ("phi", "olmo2", "gpt_neox")
PROJECTIONS = (Unit.Q, Unit.K, Unit.V, Unit.O, Unit.GATE, Unit.UP, Unit.DOWN)


class Sizes:
    """The sum of squares, GRIFFIN's statistic without its normalisation."""

    def __init__(self):
        self._sum = 0.0

    def add(self, rows):
        self._sum = self._sum + rows.float().square().sum(0)

    def value(self):
        return self._sum


class ClearSizes(Sizes):
    """With a margin between the halves that no rounding crosses."""

    def value(self):
        order = torch.randperm(len(self._sum), generator=torch.Generator().manual_seed(0)).to(self._sum.device)
        return self._sum + 1e6 * order


class OwnHalves(Sizes):
    """Another half for every length of a prompt, whatever it says."""

    def __init__(self):
        super().__init__()
        self._rows = 0

    def add(self, rows):
        super().add(rows)
        self._rows += len(rows)

    def value(self):
        order = torch.randperm(len(self._sum), generator=torch.Generator().manual_seed(self._rows))
        return order.to(self._sum.device).float()


def top_half(values):
    keep = torch.zeros_like(values, dtype=torch.bool)
    return keep.scatter_(0, values.topk(len(values) // 2).indices, True)


def gates_of(kind, neurons, layers):
    match kind:
        case "sequence":
            gates = LayerGates(neurons=PrefillGate(Sizes, top_half))
        case "refreshed":
            gates = LayerGates(neurons=PrefillGate(Sizes, top_half, refresh_every=3))
        case "clear":
            gates = LayerGates(neurons=PrefillGate(ClearSizes, top_half))
        case "own halves":
            gates = LayerGates(neurons=PrefillGate(OwnHalves, top_half))
        case "clear, refreshed":
            gates = LayerGates(neurons=PrefillGate(ClearSizes, top_half, refresh_every=3))
        case "fixed":
            mask = torch.rand(neurons, generator=torch.Generator().manual_seed(0)) < 0.5
            gates = LayerGates(neurons=FixedGate(mask))
        case "filled":
            mask = torch.rand(neurons, generator=torch.Generator().manual_seed(0)) < 0.5
            gates = LayerGates(neurons=FixedGate(mask, fill=torch.full((neurons,), 0.1)))
        case "gate":
            gates = LayerGates(neurons=TokenGate(SiteKind.GATE, Threshold(0.3)))
        case "top":
            gates = LayerGates(neurons=TokenGate(SiteKind.NEURON, TopK(neurons // 2)))
        case "all channels":
            gates = LayerGates(channels=ChannelGate({unit: ChannelRule(Threshold(0.3)) for unit in PROJECTIONS}))
        case "channels":
            units = (Unit.Q, Unit.V, Unit.O, Unit.GATE, Unit.UP, Unit.DOWN)
            gates = LayerGates(channels=ChannelGate({unit: ChannelRule(Threshold(0.3)) for unit in units}))
    return [gates] * layers


def opened(model, gates, **more):
    return Engines(resolve(model), share=False).open(gates, sink_tokens=SINK, max_length=ROOM, **more)


def run_of(run, ids, tokens):
    run.prefill(ids, watch=True)
    run.select()
    run.use(sparse=True)
    run.rewind()
    first = run.forced(tokens)
    run.use(sparse=False)
    run.rewind()
    dense = run.forced(tokens)
    run.use(sparse=True)
    run.rewind()
    assert torch.equal(run.forced(tokens), first), "a run left something behind"
    return first, dense


def in_the_masked_path(model, gates, ids, tokens):
    sites, cache = resolve(model), new_cache(model, ROOM)
    with torch.no_grad(), masked(sites, MaskedPlan(gates, prompt_length=ids.shape[1], sink_tokens=SINK)):
        prefill(model, ids, cache)
        return forced(model, tokens, cache, ids.shape[1])


def texts():
    return token_ids(1, PROMPT, seed=5).cuda(), token_ids(1, NEW, seed=6).cuda()


@pytest.mark.parametrize("kind", ["sequence", "refreshed", "filled", "top", "gate", "channels"])
def test_in_float32_a_run_is_the_masked_path(kind):
    model = make_model("llama").cuda()
    ids, tokens = texts()
    gates = gates_of(kind, model.config.intermediate_size, model.config.num_hidden_layers)
    want = in_the_masked_path(model, gates, ids, tokens)
    with opened(model, gates) as run:
        assert run.tier == 1
        found, dense = run_of(run, ids, tokens)
        assert "graph" in run.path, run.announced
    torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(
        dense, in_the_masked_path(model, gates_of_none(model), ids, tokens), atol=2e-4, rtol=2e-4
    )


def gates_of_none(model):
    return [LayerGates()] * model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["clear", "clear, refreshed", "fixed", "filled"])
def test_in_bfloat16_compiled_kernels_run_and_stay_near(kind, assert_near):
    exact = make_model("llama", **WIDE).cuda().bfloat16()
    model = copy.deepcopy(exact)
    exact.float()
    ids, tokens = texts()
    gates = gates_of(kind, 512, model.config.num_hidden_layers)
    with opened(model, gates) as run:
        found, dense = run_of(run, ids, tokens)
        assert run.announced == []
        assert run.path == "own step on cuda, graph"
        greedy = run.generate(20)
        assert len(greedy[0]) == 20
    # The prompt runs in bfloat16.
    assert_near(found, in_the_masked_path(exact, gates, ids, tokens), limit=0.05)
    assert_near(dense, in_the_masked_path(exact, gates_of_none(model), ids, tokens), limit=0.05)


@pytest.mark.parametrize("kind", ["gate", "top", "channels"])
def test_in_bfloat16_token_plans_run_in_a_graph(kind):
    model = make_model("llama", **WIDE).cuda().bfloat16()
    with opened(model, gates_of(kind, 512, model.config.num_hidden_layers)) as run:
        found, _ = run_of(run, *texts())
        assert run.announced == []
        assert run.path == "own step on cuda, graph"
        assert torch.isfinite(found).all()


def stepped(model, ids, tokens):
    """The logits after each of `tokens`, by passes of the model over a cache of its own."""
    passed = model(ids, use_cache=True)
    found = []
    for at in range(tokens.shape[1]):
        passed = model(input_ids=tokens[:, at : at + 1], past_key_values=passed.past_key_values, use_cache=True)
        found.append(passed.logits)
    return torch.cat(found, dim=1).float()


@pytest.mark.parametrize("kind", ["clear", "fixed", "filled"])
def test_a_model_that_others_drive_decodes_by_its_own_step(kind, assert_near, monkeypatch):
    made = []
    make = stepping.OwnRun
    monkeypatch.setattr(stepping, "OwnRun", lambda *args, **how: made.append(make(*args, **how)) or made[-1])
    exact = make_model("llama", **WIDE).cuda().bfloat16()
    model = copy.deepcopy(exact)
    exact.float()
    gates = gates_of(kind, 512, model.config.num_hidden_layers)
    ids, tokens = texts()
    prompts = (ids, ids.flip(1))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with sparse_generation(resolve(model), gates, sink_tokens=SINK):
            found = [stepped(model, prompt, tokens) for prompt in prompts]
            two = stepped(model, ids.expand(2, -1), tokens.expand(2, -1))
            nine = stepped(model, ids.expand(9, -1), tokens.expand(9, -1))
            model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [one.batch for one in made] == [1, 2], "a second prompt of the same size made its steps again"
    assert any("at batch 9: its own step takes 8" in str(one.message) for one in said)
    for prompt, logits in zip(prompts, found, strict=True):
        assert_near(logits, in_the_masked_path(exact, gates, prompt, tokens), limit=0.05)
    assert_near(two[:1], found[0], limit=0.05)
    assert_near(nine[:1], found[0], limit=0.05)


@pytest.mark.parametrize("family", TIER_2)
def test_the_models_own_forward_is_captured(family):
    model = make_model(family).cuda()
    assert model._can_compile_fullgraph
    ids, tokens = texts()
    neurons = resolve(model).layers[0].neurons
    gates = gates_of("sequence", neurons, model.config.num_hidden_layers)
    prompts = (ids, ids.flip(1))  # the second fills the first's buffers again
    both = [[in_the_masked_path(model, one, ids, tokens) for one in (gates, gates_of_none(model))] for ids in prompts]
    want = model.generate(prompts[1], max_new_tokens=10, do_sample=False, eos_token_id=None)[0, PROMPT:]
    with opened(model, gates) as run:
        assert run.tier == 2
        for prompt, wanted in zip(prompts, both, strict=True):
            for found, one in zip(run_of(run, prompt, tokens), wanted, strict=True):
                torch.testing.assert_close(found, one, atol=2e-4, rtol=2e-4)
            assert "in a CUDA graph" in run.path, run.announced
        run.use(sparse=False)
        assert run.generate(10) == [want.tolist()]


def test_what_cannot_be_captured_says_so_and_runs():
    model = make_model("opt").cuda()  # its positions are counted on the host
    ids, tokens = texts()
    gates = gates_of("sequence", resolve(model).layers[0].neurons, model.config.num_hidden_layers)
    wanted = [in_the_masked_path(model, one, ids, tokens) for one in (gates, gates_of_none(model))]
    with opened(model, gates) as run:
        for found, want in zip(run_of(run, ids, tokens), wanted, strict=True):
            torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)
        assert "in a CUDA graph" in run.path or any("captured" in line for line in run.announced)
    assert torch.randn(3, device="cuda").isfinite().all(), "a capture that failed leaves the generator usable"


def test_a_batch_is_run_each_for_itself_and_says_what_it_costs():
    model = make_model("llama").cuda()
    ids, tokens = token_ids(3, PROMPT, seed=5).cuda(), token_ids(3, NEW, seed=6).cuda()
    gates = gates_of("sequence", model.config.intermediate_size, model.config.num_hidden_layers)
    alone = [in_the_masked_path(model, gates, ids[i : i + 1], tokens[i : i + 1]) for i in range(3)]
    with opened(model, gates, batch=3) as run:
        found, _ = run_of(run, ids, tokens)
        torch.testing.assert_close(found, torch.cat(alone), atol=2e-4, rtol=2e-4)
        assert run.announced


@pytest.mark.parametrize("kind", ["clear", "gate", "channels", "all channels"])
@pytest.mark.parametrize("padding", [None, (0, 5, 9)])
def test_in_bfloat16_each_sequence_of_a_batch_is_that_of_batch_1_and_its_reading_is_known(kind, padding, assert_near):
    model = make_model("llama", **WIDE).cuda().bfloat16()
    ids, tokens = token_ids(3, PROMPT, seed=5).cuda(), token_ids(3, NEW, seed=6).cuda()
    gates = gates_of(kind, 512, model.config.num_hidden_layers)
    left = None if padding is None else torch.tensor(padding, device="cuda")
    with opened(model, gates, batch=3) as run:
        run.prefill(ids, watch=True, padding=left)
        run.select()
        run.use(sparse=True)
        run.forget()
        found = run.forced(tokens)
        assert run.path == "own step on cuda, graph"
        shares = run.kept()
        run.use(sparse=False)
        run.rewind()
        dense = run.forced(tokens)
        said = " ".join(run.announced)
    assert "torch.compile" not in said
    assert "masks weights" not in said
    assert ("in turns" in said) == (kind == "channels")  # which leaves one projection whole
    if kind == "clear":  # the same half for all
        assert list(shares.values()) == [0.5] * model.config.num_hidden_layers
    elif kind == "channels":
        assert shares == {}
    else:
        assert shares
        assert all(0 < share <= 1 for share in shares.values())
    for at in range(3):
        begin = 0 if padding is None else padding[at]
        with opened(model, gates) as one:
            one.prefill(ids[at : at + 1, begin:], watch=True)
            one.select()
            for sparse, of_batch in ((True, found), (False, dense)):
                one.use(sparse=sparse)
                one.rewind()
                assert_near(of_batch[at], one.forced(tokens[at : at + 1])[0], limit=0.06)


@pytest.mark.parametrize(("batch", "everything"), [(2, False), (6, True)])
def test_a_batch_reads_its_union_or_where_that_is_nearly_everything_all_in_place(batch, everything, assert_near):
    model = make_model("llama", **WIDE).cuda().bfloat16()
    ids, tokens = token_ids(batch, PROMPT, seed=5).cuda(), token_ids(batch, NEW, seed=6).cuda()
    gates, padding = gates_of("own halves", 512, model.config.num_hidden_layers), torch.arange(batch)
    with opened(model, gates, batch=batch) as run:
        run.prefill(ids, watch=True, padding=padding.cuda())
        run.select()
        run.use(sparse=True)
        run.rewind()
        found = run.forced(tokens)
        assert run.path == "own step on cuda, graph"
        shares, said = list(run.kept().values()), run.announced
    assert (NO_GAIN in said) == everything
    assert not any("masks weights" in line for line in said)
    assert all(share == 1 if everything else 0.7 < share < 0.8 for share in shares)
    assert len(shares) == model.config.num_hidden_layers
    for at in range(batch):
        with opened(model, gates) as one:
            one.prefill(ids[at : at + 1, at:], watch=True)
            one.select()
            one.use(sparse=True)
            one.rewind()
            assert_near(found[at], one.forced(tokens[at : at + 1])[0], limit=0.06)
