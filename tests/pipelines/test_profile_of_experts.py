"""A profile of a mixture of experts: statistics per expert over the tokens routed to it, against loops."""

from collections.abc import Callable
from math import log
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny import EXPERTS, FFN, SHARED, TOP_K, make_tokenizer, save_tiny, words
from torch import Tensor

from actsparse.cli.app import main
from actsparse.core.stats import mean_stderr
from actsparse.data.sequences import Sequences, blocks_of
from actsparse.errors import ModelError
from actsparse.models.load import LoadedModel, load
from actsparse.models.taps import tapped
from actsparse.pipelines.profile import profile
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.recording import record_sequences
from actsparse.results import SHARED_EXPERT, Site, SiteKind
from actsparse.specs import DataSpec, DumpSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

SINK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a shared expert in layer 0 and a dense layer 1."""
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("moe") / "model", mlp_only_layers=[1])


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSpec(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def run(folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    out = tmp_path_factory.mktemp("runs") / "profile"
    spec = ProfileSpec(
        model=ModelSpec(name=str(folder), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),), limit=5),
        output=out,
    )
    return profile(spec)


def sequences_of(prompts_file: Path, loaded: LoadedModel, count: int) -> list[Tensor]:
    import json

    texts = [json.loads(line)["text"] for line in prompts_file.read_text().splitlines()[:count]]
    return [torch.tensor(loaded.tokenizer(text).input_ids) for text in texts]


@pytest.fixture(scope="module")
def naive(loaded: LoadedModel, prompts_file: Path) -> dict[int | None, list[Tensor]]:
    """Neuron rows [neurons] by expert of layer 0 (and None: the router's logits), token by token after the sink."""
    rows: dict[int | None, list[Tensor]] = {}
    for ids in sequences_of(prompts_file, loaded, 5):

        def see(site: Site, x: Tensor) -> None:
            if site.kind is SiteKind.ROUTER:
                rows.setdefault(None, []).extend(x[0, SINK:])
                return
            for position in range(SINK, x.shape[1]):
                if tap.routed is None or tap.routed[0, position]:
                    rows.setdefault(site.expert, []).append(x[0, position])

        with tapped(loaded.sites, {SiteKind.NEURON: see, SiteKind.ROUTER: see}, (0,)) as tap, torch.no_grad():
            loaded.model(input_ids=ids[None], use_cache=False)
    return rows


def test_neurons_are_those_of_each_expert_over_its_own_tokens(
    run: ProfileRun, naive: dict, loaded: LoadedModel
) -> None:
    table = run.neurons
    places = table.select("layer", "expert").unique(maintain_order=True).rows()
    assert places == [*((0, expert) for expert in range(EXPERTS)), (0, SHARED_EXPERT), (1, None)]
    for expert in (*range(EXPERTS), SHARED_EXPERT):
        rows = table.filter((pl.col("layer") == 0) & (pl.col("expert") == expert)).sort("neuron")
        a = torch.stack(naive[expert]).double()
        assert rows.height == (SHARED if expert == SHARED_EXPERT else FFN)
        assert set(rows["tokens"]) == {len(a)}
        norms = loaded.sites.ffns[loaded.sites.ffn_index[0, expert]].down_norms().double()
        shares = (a / a.norm(dim=1, keepdim=True)).square().mean(dim=0).sqrt()
        for column, expected in (
            ("mean_abs", a.abs().mean(dim=0)),
            ("mean_norm", a.abs().mean(dim=0) * norms),
            ("griffin", shares),
            ("max_abs", a.abs().amax(dim=0)),
        ):
            torch.testing.assert_close(rows[column].to_torch(), expected, atol=1e-6, rtol=1e-5)


def measure(run: ProfileRun, metric: str, layer: int, kind: str, param: str = "") -> tuple[float, int]:
    row = run.measures.filter(metric=metric, layer=layer, kind=kind, param=param).row(0, named=True)
    return row["value"], row["n"]


def test_routing_frequencies_and_entropy(run: ProfileRun, naive: dict) -> None:
    logits = torch.stack(naive[None]).double()
    tokens = len(logits)
    chosen = logits.topk(TOP_K, dim=1).indices
    shares = []
    for expert in range(EXPERTS):
        share, n = measure(run, "expert_frac", 0, "router", f"expert={expert}")
        assert n == tokens
        assert share == pytest.approx(float((chosen == expert).any(dim=1).double().mean()))
        shares.append(share)
    assert sum(shares) == pytest.approx(TOP_K)
    p = logits.softmax(dim=1)
    entropy, n = measure(run, "router_entropy", 0, "router")
    assert entropy == pytest.approx(float(-(p * p.log()).sum(dim=1).mean()), rel=1e-5)
    assert n == tokens
    assert 0 < entropy < log(EXPERTS)


def test_the_error_of_the_routers_entropy_is_over_sequences(
    run: ProfileRun, naive: dict, loaded: LoadedModel, prompts_file: Path
) -> None:
    p = torch.stack(naive[None]).double().softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1)
    lengths = [len(ids) - SINK for ids in sequences_of(prompts_file, loaded, 5)]
    expected = mean_stderr(entropy, torch.arange(5).repeat_interleave(torch.tensor(lengths)))
    row = run.measures.filter(metric="router_entropy", layer=0).row(0, named=True)
    assert row["stderr"] == pytest.approx(expected, rel=1e-4)
    assert run.measures.filter(metric="expert_frac")["stderr"].null_count() == EXPERTS


def test_moments_of_a_layer_pool_its_routed_experts(run: ProfileRun, naive: dict) -> None:
    pooled = torch.cat([torch.cat(naive[expert]) for expert in range(EXPERTS)]).abs().double()
    value, n = measure(run, "abs_mean", 0, "neuron")
    assert n == len(pooled)
    assert value == pytest.approx(float(pooled.mean()), rel=1e-5)
    shared = torch.cat(naive[SHARED_EXPERT]).abs().double()
    value, n = measure(run, "abs_mean", 0, "shared_neuron")
    assert n == len(shared)
    assert value == pytest.approx(float(shared.mean()), rel=1e-5)
    assert {"layers.0.neuron.counts", "layers.0.shared_neuron.counts", "layers.1.neuron.counts"} <= set(run.histograms)


def plain_cett(a: Tensor, down: Tensor, target: float) -> tuple[float, float, float]:
    """eps by thirty bisections, sparsity at it, and rho, over the rows of one FFN."""
    scores, outputs = a.abs() * down.norm(dim=0), (a @ down.T).norm(dim=1)
    low, high = 0.0, float(scores.max())
    for _ in range(30):
        eps = (low + high) / 2
        dropped = torch.where(scores < eps, a, 0.0)
        cett = float(((dropped @ down.T).norm(dim=1) / outputs).mean())
        low, high = (eps, high) if cett <= target else (low, eps)
    return low, float((scores < low).double().mean()), float((scores.square().sum(dim=1) / outputs.square()).mean())


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_cett_of_each_expert_is_that_of_its_own_tokens(
    target: float, run: ProfileRun, naive: dict, loaded: LoadedModel
) -> None:
    weighted, tokens = 0.0, 0
    for expert in (*range(EXPERTS), SHARED_EXPERT):
        a = torch.stack(naive[expert]).double()
        down = loaded.sites.ffns[loaded.sites.ffn_index[0, expert]].down_matrix().double()
        eps, sparsity, rho = plain_cett(a, down, target)
        name = "shared" if expert == SHARED_EXPERT else expert
        where = f"expert={name},target={target}"
        assert measure(run, "expert_cett_eps", 0, "neuron", where) == (pytest.approx(eps, rel=1e-3), len(a))
        found, n = measure(run, "expert_cett_sparsity", 0, "neuron", where)
        assert (found, n) == (pytest.approx(sparsity, abs=1e-3), len(a))
        assert measure(run, "expert_cett_rho", 0, "neuron", f"expert={name}")[0] == pytest.approx(rho, rel=1e-4)
        if expert != SHARED_EXPERT:
            weighted, tokens = weighted + len(a) * found, tokens + len(a)
    mean, n = measure(run, "cett_sparsity", 0, "neuron", f"target={target}")
    assert (mean, n) == (pytest.approx(weighted / tokens), tokens)
    dense = measure(run, "cett_sparsity", 1, "neuron", f"target={target}")[0]
    whole = run.measures.filter(metric="cett_sparsity", param=f"target={target}").filter(pl.col("layer").is_null())
    assert whole["value"].to_list() == [pytest.approx((mean + dense) / 2)]


def test_samples_and_coactivation_of_experts_are_kept(run: ProfileRun, naive: dict) -> None:
    kept = load_file(run.path / "reservoir.safetensors")
    for expert, name in ((2, "experts.2"), (SHARED_EXPERT, "shared")):
        rows = kept[f"layers.0.{name}.neuron"]
        expected = torch.stack(naive[expert])
        torch.testing.assert_close(rows.sum(dim=0), expected.sum(dim=0), atol=1e-4, rtol=1e-4)
        assert len(rows) == len(expected)
    phi = run.measures.filter(metric="expert_coactivation_phi", layer=0)
    assert set(phi["param"]) == {*(f"expert={expert}" for expert in range(EXPERTS)), "expert=shared"}
    assert phi["value"].is_between(-1, 1).all()


def test_a_sample_of_an_expert_is_bounded_and_does_not_depend_on_batches(loaded: LoadedModel) -> None:
    text = words(400, seed=4)
    small, other = (recorded(loaded, blocks(text), size, slots=7) for size in (1, 3))
    for place, sample in small.experts.items():
        assert sample.used <= 7
        assert (sample.keys == other.experts[place].keys).all() or set(sample.keys) == set(other.experts[place].keys)
        torch.testing.assert_close(sample.rows(place), other.experts[place].rows(place), atol=1e-5, rtol=1e-4)


def test_parts_merge_to_the_whole(loaded: LoadedModel) -> None:
    # three blocks each: nineteen words after the first token
    first, second = words(57, seed=1), words(57, seed=2)
    state = recorded(loaded, blocks(first), 1)
    state.merge(recorded(loaded, blocks(second), 1))
    together = recorded(loaded, blocks(f"{first} {second}"), 1)
    for place, sample in together.experts.items():
        torch.testing.assert_close(state.experts[place].rows(place), sample.rows(place), atol=1e-6, rtol=1e-5)
    merged, whole = state.tensors(), together.tensors()
    assert merged.keys() == whole.keys()
    for name, tensor in whole.items():
        if name.startswith(("neurons", "routers", "heads", "moments")):
            torch.testing.assert_close(merged[name], tensor, atol=1e-9, rtol=1e-9, msg=name)


def test_batches_agree(loaded: LoadedModel) -> None:
    text = words(57, seed=3)
    one, three = recorded(loaded, blocks(text), 1).tensors(), recorded(loaded, blocks(text), 3).tensors()
    for name in ("neurons.2/total_abs", "neurons.5/total_abs", "routers.0/sums"):
        torch.testing.assert_close(one[name], three[name], atol=1e-5, rtol=1e-4)


def blocks(text: str) -> Sequences:
    return blocks_of(text, make_tokenizer(), block_length=20, prompt_length=8, source="t", role="profile")


def recorded(loaded: LoadedModel, blocks: Sequences, batch_size: int, slots: int = 8):
    return record_sequences(
        loaded, blocks, layers=(0, 1), slots=slots, seed=0, batch_size=batch_size, what="t", progress=Silent()
    )


def test_a_state_survives_a_shard(loaded: LoadedModel) -> None:
    blocks = blocks_of(
        words(60, seed=1), make_tokenizer(), block_length=20, prompt_length=8, source="t", role="profile"
    )
    one, other = recorded(loaded, blocks, 2), recorded(loaded, blocks, 1)
    other.load(one.tensors())
    for name, tensor in one.tensors().items():
        assert torch.equal(other.tensors()[name], tensor)


def test_a_dump_of_experts_neurons_is_refused(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    spec = ProfileSpec(
        model=ModelSpec(name=str(folder), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),), limit=2),
        dump=DumpSpec(layers=None, kinds=("neuron",)),
        output=tmp_path / "dump",
    )
    with pytest.raises(ModelError, match="layer 0 is a mixture of experts"):
        profile(spec)


def test_every_family_of_experts_is_profiled(
    tiny_folder: Callable[[str], Path], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("mixtral", "qwen3_moe", "olmoe"):
        out = tmp_path / family
        line = ["profile", "-m", str(tiny_folder(family)), "--prompts", str(prompts_file), "-n", "3"]
        assert main([*line, "-o", str(out)]) == 0
        assert f"Routers: {TOP_K} of {EXPERTS} experts a token" in capsys.readouterr().out
        found = ProfileRun.open(out)
        assert found.neurons.height == 2 * EXPERTS * FFN
        frequencies = found.measures.filter(metric="expert_frac", layer=1)["value"]
        assert frequencies.sum() == pytest.approx(TOP_K)
