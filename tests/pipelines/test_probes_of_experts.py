"""The probes of a mixture of experts: units are (expert, neuron), chance knows the routing; against loops over sets."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from listening import Listener
from tiny import EXPERTS, FFN, LAYERS, SHARED, TOP_K, make_model, make_tokenizer, save_tiny

from actsparse.cli.app import main
from actsparse.core.hu4 import theta_uncertainty
from actsparse.data.texts import TextReader
from actsparse.models.load import LoadedModel, load
from actsparse.models.taps import tapped
from actsparse.pipelines.probes.text import probe_texts
from actsparse.pipelines.profile import profile
from actsparse.results import SHARED_EXPERT, Site, SiteKind
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

BLOCK, PROMPT, N, SINK = 64, 32, 6, 4
KEPT = math.floor(0.2 * FFN + 0.5)

# The active neurons of one token by the expert that they are of.
Mask = dict[int, set[int]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of 20 kinds of words, so that some types are frequent (`w5` is the full stop)."""
    rng, found = random.Random(2), []
    while len(found) < 1400:
        found += [f"w{6 + min(int(rng.expovariate(0.2)), 19)}" for _ in range(rng.randint(11, 16))] + ["."]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(" ".join(found))
    return path


def with_full_stop(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"."'))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_full_stop(save_tiny("mixtral", tmp_path_factory.mktemp("models") / "moe"))


def spec_of(folder: Path, corpus: Path, output: Path, **options: object) -> ProfileSpec:
    data = DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT)
    model = ModelSpec(name=str(folder), device="cpu")
    return ProfileSpec(model=model, data=data, output=output, cett_targets=(0.2,), **options)


@pytest.fixture(scope="module")
def probed(folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    out = tmp_path_factory.mktemp("runs") / "probed"
    return profile(spec_of(folder, corpus, out, probes=("uncertainty", "inertia", "union", "gradients")))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSpec(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel, corpus: Path):
    data = DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT)
    reader = TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _line: None)
    return probe_texts(reader, ("uncertainty",), loaded.record.vocab_size)


def rows_of(run: ProfileRun, metric: str) -> dict[tuple[int | None, str], float]:
    found = run.measures.filter(pl.col("metric") == metric)
    return dict(zip(zip(found["layer"], found["param"], strict=True), found["value"].to_list(), strict=True))


def masks_of(loaded: LoadedModel, ids: torch.Tensor, layer: int) -> list[list[Mask]]:
    """The masks of every token of every sequence, expert by expert."""
    found: list[list[Mask]] = [[{} for _ in row] for row in ids.tolist()]
    for row, sequence in enumerate(ids):

        def see(site: Site, a: torch.Tensor, row: int = row) -> None:
            norms = loaded.sites.ffns[loaded.sites.ffn_index[layer, site.expert]].down_norms()
            for position in range(a.shape[1]):
                if tap.routed is None or tap.routed[0, position]:
                    kept = (a[0, position].abs() * norms).topk(math.floor(0.2 * len(norms) + 0.5))
                    found[row][position][site.expert] = set(kept.indices.tolist())

        with tapped(loaded.sites, {SiteKind.NEURON: see}, (layer,)) as tap, torch.no_grad():
            loaded.model(input_ids=sequence[None], use_cache=False)
    return found


def overlap(first: Mask, second: Mask) -> float:
    shared = sum(len(first[expert] & second[expert]) for expert in first.keys() & second.keys())
    return shared / min(*(sum(map(len, mask.values())) for mask in (first, second)))


def chance(first: Mask, second: Mask, rates: dict[int, float]) -> float:
    together = sum(rates[expert] * len(first[expert]) * len(second[expert]) for expert in first.keys() & second.keys())
    return together / min(*(sum(map(len, mask.values())) for mask in (first, second)))


def kappa(first: Mask, second: Mask, rates: dict[int, float]) -> float:
    expected = chance(first, second, rates)
    return (overlap(first, second) - expected) / (1 - expected)


UNIFORM = dict.fromkeys(range(EXPERTS), 1 / FFN)


def popular(loaded: LoadedModel, blocks: torch.Tensor, layer: int) -> dict[int, float]:
    """The mean share of its neurons that two tokens of an expert have in common, over how many those are."""
    tokens = [mask for row in masks_of(loaded, blocks, layer) for mask in row[SINK:]]
    return {
        expert: mean([len(a & b) for a, b in itertools.combinations([of[expert] for of in tokens if expert in of], 2)])
        / KEPT**2
        for expert in range(EXPERTS)
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_within_and_between_are_those_of_sets_of_experts_and_neurons(probed, loaded, texts) -> None:
    ids = texts.spread()[:, :PROMPT]
    where = "r=0.2,rung=natural"
    for layer in range(LAYERS):
        masks = masks_of(loaded, ids, layer)
        by_popularity = popular(loaded, texts.calibration, layer)
        raw, uniform, popularity = [], [], []
        for sequence, row in zip(ids.tolist(), masks, strict=True):
            for one, other in itertools.combinations(range(SINK, PROMPT), 2):
                if other - one >= 8 and sequence[one] != sequence[other]:
                    raw.append(overlap(row[one], row[other]))
                    uniform.append(kappa(row[one], row[other], UNIFORM))
                    popularity.append(kappa(row[one], row[other], by_popularity))
        assert rows_of(probed, "overlap_w")[layer, where] == pytest.approx(mean(raw), abs=1e-4)
        assert rows_of(probed, "kappa_u")[layer, f"pairs=within,{where}"] == pytest.approx(mean(uniform), abs=1e-4)
        found = rows_of(probed, "kappa_p")[layer, f"pairs=within,pop=nat,{where}"]
        assert found == pytest.approx(mean(popularity), abs=1e-4)
        between = [
            overlap(masks[a][at], masks[b][at])
            for a, b in itertools.combinations(range(len(ids)), 2)
            for at in range(SINK, PROMPT)
            if ids[a, at] != ids[b, at]
        ]
        assert rows_of(probed, "overlap_b")[layer, where] == pytest.approx(mean(between), abs=1e-4)
        every = [mask for row in masks for mask in row[SINK:]]
        expected = mean([chance(one, other, UNIFORM) for one, other in itertools.combinations(every, 2)])
        assert rows_of(probed, "e_uniform")[layer, where] == pytest.approx(expected, abs=1e-5)


def test_each_kind_of_pair_has_the_chance_level_of_its_own_pairs(probed, loaded, texts) -> None:
    """The mean over the very pairs whose overlap is shown, one by one."""
    ids, layer = texts.spread()[:, :PROMPT], 1
    masks, positions = masks_of(loaded, ids, layer), range(SINK, PROMPT)
    rows = range(len(ids))
    pairs = {
        "within": [(a, i, a, j) for a in rows for i, j in itertools.combinations(positions, 2) if j - i >= 8],
        "between": [(a, i, b, i) for a, b in itertools.combinations(rows, 2) for i in positions],
        "neighbour": [(a, i, a, i + 1) for a in rows for i in positions if i + 1 < PROMPT],
    }
    levels = {
        ("e_uniform", ""): UNIFORM,
        ("e_pop", "pop=nat,"): popular(loaded, texts.calibration, layer),
        ("e_pop", "pop=own,"): popular(loaded, ids, layer),
    }
    shown = {}
    for (metric, pop), rates in levels.items():
        for kind, of_kind in pairs.items():
            expected = mean([
                chance(masks[a][i], masks[b][j], rates) for a, i, b, j in of_kind if ids[a, i] != ids[b, j]
            ])  # fmt: skip
            found = rows_of(probed, metric)[layer, f"pairs={kind},{pop}r=0.2,rung=natural"]
            assert found == pytest.approx(expected, abs=1e-5), (metric, pop, kind)
            shown[metric, pop, kind] = found
    assert shown["e_uniform", "", "neighbour"] != pytest.approx(shown["e_uniform", "", "between"], rel=0.01)


@pytest.mark.parametrize("distance", [1, 16])
def test_each_distance_has_the_chance_level_of_its_own_pairs(probed, loaded, texts, distance: int) -> None:
    ids, levels = texts.spread(), {"e_uniform": [], "e_pop": []}
    for layer in range(LAYERS):
        masks = masks_of(loaded, ids, layer)
        pairs = [
            (row[at], row[at + distance])
            for row, sequence in zip(masks, ids.tolist(), strict=True)
            for at in range(SINK, BLOCK - distance)
            if sequence[at] != sequence[at + distance]
        ]
        for metric, rates in (("e_uniform", UNIFORM), ("e_pop", popular(loaded, texts.calibration, layer))):
            levels[metric].append(mean([chance(one, other, rates) for one, other in pairs]))
    where = f"d={distance},pairs=distance,"
    assert rows_of(probed, "e_uniform")[None, f"{where}r=0.2"] == pytest.approx(mean(levels["e_uniform"]), abs=1e-5)
    assert rows_of(probed, "e_pop")[None, f"{where}pop=nat,r=0.2"] == pytest.approx(mean(levels["e_pop"]), abs=1e-5)


def test_hu1_compares_the_last_tokens_of_contexts(probed, loaded, texts) -> None:
    contexts = texts.contexts
    for layer in range(LAYERS):
        last = [row[-1] for row in masks_of(loaded, contexts.tokens, layer)]
        types = contexts.types.tolist()
        per_type = [
            mean([
                kappa(last[a], last[b], UNIFORM)
                for a, b in itertools.combinations([at for at, kind in enumerate(types) if kind == token], 2)
            ])
            for token in sorted(set(types))
        ]  # fmt: skip
        assert rows_of(probed, "hu1")[layer, "r=0.2"] == pytest.approx(1 - mean(per_type), abs=1e-4)


def prefix_kappa(loaded: LoadedModel, ids: torch.Tensor, layer: int, prefix: int) -> float:
    """The mean kappa_u of the mask of the first tokens, expert by expert, with the masks of later tokens."""
    kappas = []
    for row, sequence in enumerate(ids):
        rows: dict[int, list[torch.Tensor]] = {}

        def see(site: Site, a: torch.Tensor, rows: dict[int, list[torch.Tensor]] = rows) -> None:
            for position in range(SINK, SINK + prefix):
                if tap.routed is None or tap.routed[0, position]:
                    rows.setdefault(site.expert, []).append(a[0, position].double())

        with tapped(loaded.sites, {SiteKind.NEURON: see}, (layer,)) as tap, torch.no_grad():
            loaded.model(input_ids=sequence[None], use_cache=False)
        chosen = {
            expert: set(
                sum((a / a.norm()) ** 2 for a in own).topk(math.floor(0.2 * len(own[0]) + 0.5)).indices.tolist()
            )
            for expert, own in rows.items()
        }
        widths = {expert: 1 / len(own[0]) for expert, own in rows.items()}
        kappas += [kappa(chosen, mask, widths) for mask in masks_of(loaded, ids[[row]], layer)[0][SINK + prefix :]]
    return mean(kappas)


def test_prefix_masks_are_those_of_each_expert_over_its_own_tokens(probed, loaded, texts) -> None:
    expected = prefix_kappa(loaded, texts.spread(), 0, 8)
    assert rows_of(probed, "si1")[0, "p=8,r=0.2"] == pytest.approx(expected, abs=1e-4)


def test_the_union_counts_neurons_of_all_experts(probed, loaded, texts) -> None:
    masks = masks_of(loaded, texts.pool, 1)
    fired = [[{(e, n) for e, of in mask.items() for n in of} for mask in row[SINK:]] for row in masks]
    share = mean([len(mask) for row in fired for mask in row]) / (EXPERTS * FFN)
    assert rows_of(probed, "union")[1, "b=1,r=0.2"] == pytest.approx(share)
    pairs = [len(a | b) for x, y in itertools.combinations(fired, 2) for a in x[::6] for b in y[::6]]
    assert rows_of(probed, "union")[1, "b=2,r=0.2"] == pytest.approx(mean(pairs) / (EXPERTS * FFN), abs=0.01)


def test_hu2_counts_a_neuron_as_silent_where_its_expert_is_not_asked(probed, loaded, texts) -> None:
    tokens = [token for row in texts.history_blocks.tolist() for token in row[SINK:]]
    frequent = {token for token in tokens if tokens.count(token) >= 50}
    masks = [mask for row in masks_of(loaded, texts.history_blocks, 0) for mask in row[SINK:]]
    seen = [(token, mask) for token, mask in zip(tokens, masks, strict=True) if token in frequent]

    def entropy(count: int, n: int) -> float:
        shares = [share for share in (count / n, 1 - count / n) if share > 0]
        return -math.fsum(p * math.log(p) for p in shares) + (len(shares) - 1) / (2 * n)

    total = conditional = 0.0
    for expert, neuron in itertools.product(range(EXPERTS), range(FFN)):
        on = [(token, neuron in mask.get(expert, ())) for token, mask in seen]
        total += entropy(sum(fires for _, fires in on), len(on))
        for kind in frequent:
            mine = [fires for token, fires in on if token == kind]
            conditional += len(mine) / len(on) * entropy(sum(mine), len(mine))
    assert rows_of(probed, "hu2_uncorrected")[0, "r=0.2"] == pytest.approx(conditional / total, abs=1e-3)


def test_without_a_frequent_type_there_is_no_entropy(folder: Path, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("actsparse.pipelines.probes.text.MIN_TYPE_COUNT", 10**6)
    run = profile(spec_of(folder, corpus, tmp_path / "run", probes=("uncertainty",), layers=(1,)))
    assert {name: rows_of(run, name)[1, "r=0.2"] for name in ("hu2", "hu2_entropy")} == {
        "hu2": None,
        "hu2_entropy": None,
    }


def test_variance_is_split_expert_by_expert(probed, loaded, texts) -> None:
    """Regressions one after the other over the tokens of each expert, their squares added up."""
    ids = texts.spread()
    tokens = ids[:, SINK:]
    rows, activations = ({expert: [] for expert in range(EXPERTS)} for _ in range(2))
    for row, sequence in enumerate(ids):

        def see(site: Site, a: torch.Tensor, row: int = row) -> None:
            served = tap.routed[0, SINK:].nonzero().flatten()
            rows[site.expert].append(torch.cat([torch.full((len(served), 1), row), served[:, None]], dim=1))
            activations[site.expert].append(a[0, SINK:][served].double())

        with tapped(loaded.sites, {SiteKind.NEURON: see}, (0,)) as tap, torch.no_grad():
            loaded.model(input_ids=sequence[None], use_cache=False)
    kinds = [token for token in tokens.unique().tolist() if int((tokens == token).sum()) >= 8]
    left = [0.0] * 5
    for expert in range(EXPERTS):
        at, a = torch.cat(rows[expert]).long(), torch.cat(activations[expert])
        y = (1e-4 + a.abs() / a.norm(dim=1, keepdim=True)).log()
        left[0] += float((y - y.mean()).square().sum())
        design = torch.ones(len(y), 1, dtype=torch.float64)
        levels = (
            (None, None),
            (range(len(ids)), at[:, 0]),
            (kinds, tokens[at[:, 0], at[:, 1]]),
            (range(8), at[:, 1] * 8 // (BLOCK - SINK)),
        )
        for step, (names, of) in enumerate(levels, start=1):
            if names is not None:
                design = torch.cat([design, torch.stack([(of == name).double() for name in names], dim=1)], dim=1)
            left[step] += float((y - design @ (torch.linalg.pinv(design) @ y)).square().sum())
    shares = [(before - after) / left[0] for before, after in itertools.pairwise(left)] + [left[-1] / left[0]]
    for name, share in zip(("neuron", "sequence", "token_type", "position", "residual"), shares, strict=True):
        assert rows_of(probed, "si3")[0, f"factor={name}"] == pytest.approx(share, abs=1e-4), name


def test_m2_is_that_of_gradients_taken_expert_by_expert(probed, loaded, texts) -> None:
    sums, count, layer = 0.0, 0, 1
    for ids in texts.pool[:N]:
        kept: dict[int, torch.Tensor] = {}

        def see(site: Site, a: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[site.expert] = a.detach().requires_grad_()
            return kept[site.expert]

        with tapped(loaded.sites, {SiteKind.NEURON: see}, (layer,)), torch.enable_grad():
            logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
            found = torch.autograd.grad(loss, list(kept.values()))
        masks = masks_of(loaded, ids[None], layer)[0]
        for (expert, a), gradient in zip(kept.items(), found, strict=True):
            for position in range(SINK, BLOCK - 1):
                for neuron in masks[position].get(expert, ()):
                    sums += float(a[0, position, neuron].detach().sign() * gradient[0, position, neuron])
                    count += 1
    assert rows_of(probed, "m2")[layer, "r=0.2"] == pytest.approx(sums / count, rel=1e-3, abs=1e-7)
    assert rows_of(probed, "hu4") == {}


def test_tokens_of_unlike_texts_share_no_more_than_their_experts_explain(probed) -> None:
    """The chance level is right: unrelated contexts have a kappa of 0, within the interval."""
    low, high = (rows_of(probed, f"kappa_p{end}") for end in ("_low", "_high"))
    where = (None, "pairs=unrelated,pop=nat,r=0.2")
    assert low[where] - 0.01 <= 0 <= high[where] + 0.01


def test_a_model_that_never_looks_back_leaves_nothing_to_the_history(corpus: Path, tmp_path: Path) -> None:
    """Planted: without attention the token decides experts and neurons."""
    model = make_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    run = profile(spec_of(with_full_stop(tmp_path / "m"), corpus, tmp_path / "run", probes=("uncertainty",)))
    for name in ("r=0.2", "pop=nat,r=0.2", "control=shuffled,r=0.2"):
        assert rows_of(run, "hu1")[None, name] == pytest.approx(0, abs=1e-6)
    assert rows_of(run, "hu1")[None, "control=other-token,r=0.2"] > 0.5
    assert rows_of(run, "hu2_uncorrected")[None, "r=0.2"] == pytest.approx(0, abs=1e-6)
    assert rows_of(run, "history_share")[None, "pop=nat,r=0.2"] == pytest.approx(0, abs=0.1)


def test_a_hot_set_in_every_expert_is_what_popularity_explains(corpus: Path, tmp_path: Path) -> None:
    """Planted: the active neurons come from two fifths of each expert, and else from the token."""
    model = make_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[:, :, : 2 * KEPT] *= 1e4
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    options = {"probes": ("uncertainty",), "layers": (1,)}
    run = profile(spec_of(with_full_stop(tmp_path / "m"), corpus, tmp_path / "run", **options))
    assert rows_of(run, "kappa_u")[None, "pairs=unrelated,r=0.2"] > 0.2
    assert rows_of(run, "kappa_p")[None, "pairs=unrelated,pop=nat,r=0.2"] == pytest.approx(0, abs=0.02)


def neurons_of_the_mlp(loaded: LoadedModel, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The activations and gradients of a layer without experts, [positions, neurons]."""
    kept: list[torch.Tensor] = []

    def see(_site: Site, a: torch.Tensor) -> torch.Tensor:
        kept.append(a.detach().requires_grad_())
        return kept[-1]

    with tapped(loaded.sites, {SiteKind.NEURON: see}, (layer,)), torch.enable_grad():
        logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, kept)
    return kept[0][0].detach(), gradient[0]


def test_a_shared_expert_and_dense_layers_are_measured_beside(corpus: Path, texts, tmp_path: Path) -> None:
    folder = with_full_stop(save_tiny("qwen2_moe", tmp_path / "m", mlp_only_layers=[1]))
    run = profile(spec_of(folder, corpus, tmp_path / "run", probes=("union", "inertia", "uncertainty", "gradients"),
                          masks=("topk", "cett")))  # fmt: skip
    kept = TOP_K * KEPT + math.floor(0.2 * SHARED + 0.5)
    union = rows_of(run, "union")
    assert union[0, "b=1,r=0.2"] == pytest.approx(kept / (EXPERTS * FFN + SHARED))
    assert union[1, "b=1,r=0.2"] == pytest.approx(KEPT / FFN)
    assert rows_of(run, "e_uniform")[1, "r=0.2,rung=natural"] == pytest.approx(KEPT / FFN)
    mixed = load(ModelSpec(name=str(folder), device="cpu"))
    for layer in (0, 1):
        expected = prefix_kappa(mixed, texts.spread(), layer, 8)
        assert rows_of(run, "si1")[layer, "p=8,r=0.2"] == pytest.approx(expected, abs=1e-4)
    cett = rows_of(run, "overlap_w")
    assert all(0 < cett[layer, "masks=cett,rung=natural"] < 1 for layer in (0, 1))
    assert all(rows_of(run, "m2")[layer, "r=0.2"] is not None for layer in (0, 1))
    theta, ids = [], texts.pool[:N]
    for sequence in ids:
        a, gradient = neurons_of_the_mlp(mixed, sequence, 1)
        theta.append(theta_uncertainty((a * gradient)[SINK : BLOCK - 1].abs()))
    hu4 = rows_of(run, "hu4")
    assert hu4[1, ""] == pytest.approx(torch.stack(theta).nanmean().item(), abs=2e-3)
    assert hu4[None, ""] == pytest.approx(hu4[1, ""])
    assert hu4[0, ""] is None
    experts = run.neurons.filter(pl.col("layer") == 0)["expert"].unique().to_list()
    assert SHARED_EXPERT in experts


def test_a_killed_run_goes_on_to_the_same_rows(probed: ProfileRun, folder: Path, corpus: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, corpus, tmp_path / "cut", probes=("uncertainty", "inertia", "union", "gradients"))
    with pytest.raises(KeyboardInterrupt):
        profile(spec, Listener("union: neurons of a batch", 1))
    resumed = profile(spec, again := Listener())
    assert "resuming: the probe inertia was finished before" in again.notes
    assert resumed.measures.equals(probed.measures)


def test_the_command_measures_them_and_says_what_has_no_definition(
    tiny_folder: Callable[[str], Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("qwen3_moe", "olmoe"):
        line = ["profile", "-m", str(tiny_folder(family)), "--corpus", str(corpus), "-n", "3", "--block-length", "64",
                "--prompt-length", "16", "--probes", "union,gradients", "-o", str(tmp_path / family)]  # fmt: skip
        assert main(line) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "a token keeping none of an expert that it is not routed to" in said
        assert "HU4 of layers of experts (it ranks all neurons of a layer at a token, which passes through" in said
        assert "the spread of CETT over tokens and positions (a threshold of one expert" in said
        assert rows_of(ProfileRun.open(tmp_path / family), "union")[0, "b=1,r=0.2"] < 0.2
