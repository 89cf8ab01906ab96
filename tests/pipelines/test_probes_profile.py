"""The probes of a profile: every row is there, the numbers are those of a naive computation, a killed run goes on."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from listening import Listener
from safetensors.torch import load_file
from tiny import FFN, LAYERS, save_tiny
from torch import Tensor

from actsparse import twins
from actsparse.cli.app import main
from actsparse.core.batch_union import batch_union
from actsparse.data.texts import TextReader
from actsparse.errors import ActsparseError, DataError
from actsparse.models.load import LoadedModel, load
from actsparse.models.taps import tapped
from actsparse.pipelines.probes.names import BY_DEFAULT, CHEAP_PARAMETERS, PROBES, chosen, left_out, probe_names
from actsparse.pipelines.probes.reading import NeuronReader, OnLayer
from actsparse.pipelines.probes.text import probe_texts
from actsparse.pipelines.profile import profile
from actsparse.results import SiteKind
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

BLOCK, PROMPT, N, SINK = 64, 32, 8, 4
RUNGS = ("natural", "sentence-shuffled", "token-shuffled", "unigram-random", "uniform-random", "repeat")
CONTROLS = ("identical", "shuffled", "random", "none", "other-token")
DENSITIES = ("0.2", "0.5")
ENDS = ("", "_low", "_high")


def sentences_text(count: int, seed: int) -> str:
    """`count` random words in sentences of 11 to 16 words; the first words are much the likelier."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        found += [f"w{min(int(rng.expovariate(0.08)) + 6, 115)}" for _ in range(rng.randint(11, 16))] + ["."]
    return " ".join(found[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows the full stop (in the place of `w5`)."""
    made = save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")
    file = made / "tokenizer.json"
    text = file.read_text()
    assert text.count('"w5"') == 1
    file.write_text(text.replace('"w5"', '"."'))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(sentences_text(1400, seed=3))
    return path


def data_of(corpus: Path, **options: object) -> DataSpec:
    return DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT, **options)


def spec_of(folder: Path, data: DataSpec, output: Path, **options: object) -> ProfileSpec:
    return ProfileSpec(
        model=ModelSpec(name=str(folder), device="cpu"), data=data, output=output, cett_targets=(0.2,), **options
    )


@pytest.fixture(scope="module")
def probed(folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    """A profile with every probe."""
    out = tmp_path_factory.mktemp("runs") / "probed"
    return profile(spec_of(folder, data_of(corpus), out, probes=("union", "inertia", "uncertainty")))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSpec(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel, corpus: Path):
    reader = TextReader(data_of(corpus), loaded.tokenizer, loaded.record.max_positions, lambda _line: None)
    return probe_texts(reader, ("uncertainty",), loaded.record.vocab_size)


def rows_of(run: ProfileRun, metric: str) -> dict[tuple[int | None, str], float | None]:
    found = run.measures.filter(pl.col("metric") == metric)
    keys = list(zip(found["layer"], found["param"], strict=True))
    assert len(set(keys)) == len(keys), f"{metric} has two rows of one name"
    return dict(zip(keys, found["value"].to_list(), strict=True))


def expected_params(**axes: tuple[str | None, ...]) -> set[str]:
    """Every combination of the values, None leaving its key out, as the `param` column writes it."""
    combined = itertools.product(*axes.values())
    named = [{k: v for k, v in zip(axes, values, strict=True) if v is not None} for values in combined]
    return {",".join(f"{key}={one[key]}" for key in sorted(one)) for one in named}


def on_layers(params: set[str], *, mean: bool = True) -> set[tuple[int | None, str]]:
    return set(itertools.product([*range(LAYERS), *([None] if mean else [])], params))


UNIFORM_AND_NATURAL = (None, "nat")
PAIRS = ("within", "between", "between-apart", "neighbour")
# of 60 positions after the sink tokens
DISTANCES = ("1", "2", "4", "8", "16", "32")
INTERVALS = {
    "hu1": on_layers(expected_params(r=DENSITIES, pop=UNIFORM_AND_NATURAL, control=(None, *CONTROLS))),
    "history_share": on_layers(expected_params(r=DENSITIES, pop=("nat",))),
    "overlap_w": on_layers(expected_params(r=DENSITIES, rung=RUNGS)),
    "overlap_b": on_layers(expected_params(r=DENSITIES, rung=RUNGS)),
    "overlap_b_apart": on_layers(expected_params(r=DENSITIES, rung=RUNGS)),
    "overlap_neighbour": on_layers(expected_params(r=DENSITIES, rung=RUNGS)),
    "si2_j": on_layers(expected_params(r=DENSITIES, rung=RUNGS, pop=(None, "nat", "own"))),
    "sir": {(None, param) for param in expected_params(r=DENSITIES, pop=(None, "nat", "own"))},
    "kappa_u": on_layers(
        expected_params(r=DENSITIES, rung=RUNGS, pairs=PAIRS)
        | expected_params(r=DENSITIES, pairs=("same-history", "same-token", "unrelated"))
    )
    | {(None, param) for param in expected_params(r=DENSITIES, pairs=("distance",), d=DISTANCES)},
    "kappa_p": on_layers(
        expected_params(
            r=DENSITIES, rung=RUNGS, pairs=PAIRS, pop=("nat", "own")
        )
        | expected_params(r=DENSITIES, pairs=("same-history", "same-token", "unrelated"), pop=("nat",))
    )
    | {(None, param) for param in expected_params(r=DENSITIES, pairs=("distance",), d=DISTANCES, pop=("nat",))},
    "overlap_distance": {(None, param) for param in expected_params(r=DENSITIES, d=DISTANCES)},
    "hu2": on_layers(expected_params(r=DENSITIES)),
    "hu2_uncorrected": on_layers(expected_params(r=DENSITIES)),
    "hu2_shuffled": on_layers(expected_params(r=DENSITIES)),
    "si3": on_layers(expected_params(factor=("neuron", "sequence", "token_type", "position", "residual"))),
    "matrix_2x2": on_layers(
        expected_params(
            r=DENSITIES, pop=UNIFORM_AND_NATURAL, text=("real", "random"), feed=("parallel", "sequential")
        )
    )
    | {
        (None, param)
        for param in expected_params(
            r=DENSITIES, pop=UNIFORM_AND_NATURAL, text=("real", "random"), feed=("parallel", "sequential"),
            band=("early", "middle", "late"),
        )
    },
}  # fmt: skip
SIZES = ("1", "2", "4", "8", "16", "32", "64")
PLAIN = {
    "e_pop": on_layers(expected_params(r=DENSITIES, rung=RUNGS, pop=("nat", "own"), pairs=(None, *PAIRS)))
    | {(None, param) for param in expected_params(r=DENSITIES, pairs=("distance",), d=DISTANCES, pop=("nat",))},
    "e_uniform": on_layers(expected_params(r=DENSITIES, rung=RUNGS, pairs=(None, *PAIRS)))
    | {(None, param) for param in expected_params(r=DENSITIES, pairs=("distance",), d=DISTANCES)},
    "si1_p90": on_layers(expected_params(r=DENSITIES, pop=UNIFORM_AND_NATURAL)),
}


@pytest.mark.parametrize("metric", INTERVALS)
def test_every_row_stands_with_its_interval(metric: str, probed: ProfileRun) -> None:
    value, low, high = (rows_of(probed, metric + end) for end in ENDS)
    assert set(value) == set(low) == set(high) == INTERVALS[metric]
    for key, number in value.items():
        if number is not None:
            assert math.isfinite(number)
            assert low[key] is not None
            assert low[key] - 0.1 <= number <= high[key] + 0.1
    rows = probed.measures.filter(pl.col("metric") == metric)
    assert rows["n"].min() > 1
    assert rows["kind"].unique().to_list() == ["neuron"]


@pytest.mark.parametrize("metric", PLAIN)
def test_every_row_without_an_interval_stands(metric: str, probed: ProfileRun) -> None:
    assert set(rows_of(probed, metric)) == PLAIN[metric]


def test_prefix_curves_and_unions_have_every_point(probed: ProfileRun) -> None:
    prefixes = tuple(str(2**power) for power in range(9))
    curve = rows_of(probed, "si1")
    points = expected_params(r=DENSITIES, pop=UNIFORM_AND_NATURAL, p=prefixes)
    by_delta = expected_params(r=DENSITIES, pop=UNIFORM_AND_NATURAL, p=prefixes, delta=prefixes)
    assert set(curve) == on_layers(points) | {(None, param) for param in by_delta}
    assert curve[0, "p=32,r=0.2"] is not None
    # blocks of 64 tokens have no prefix of 64 after the sink tokens
    assert curve[0, "p=64,r=0.2"] is None
    for metric in ("union", "union_independent", "union_uniform"):
        found = rows_of(probed, metric)
        everywhere = {(None, param) for param in expected_params(r=DENSITIES, b=tuple(map(str, range(1, 65))))}
        assert set(found) == on_layers(expected_params(r=DENSITIES, b=SIZES)) | everywhere


def test_a_union_has_an_interval_until_a_batch_takes_every_sequence(probed: ProfileRun) -> None:
    value, low, high = (rows_of(probed, f"union{end}") for end in ENDS)
    sequences = probed.measures.filter(pl.col("metric") == "union")["n"].unique().to_list()
    assert len(sequences) == 1
    for (layer, name), number in value.items():
        batch = int(name.removeprefix("b=").split(",")[0])
        assert (low[layer, name] is None) == (batch >= sequences[0])
        if batch < sequences[0]:
            assert low[layer, name] <= number <= high[layer, name]


def test_the_identical_context_is_exactly_zero(probed: ProfileRun) -> None:
    rows = [
        value
        for end in ENDS
        for (_, param), value in rows_of(probed, f"hu1{end}").items()
        if "control=identical" in param
    ]
    assert len(rows) == 3 * 2 * 2 * (LAYERS + 1)
    assert set(rows) == {0.0}


def test_the_identical_context_is_zero_where_batches_round_otherwise(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 16-bit kernels may: what they make of a sequence depends on how many are beside it."""
    read = NeuronReader.read

    def rounded(self: NeuronReader, ids: Tensor, on_layer: OnLayer, layers: tuple[int, ...] | None = None) -> None:
        def otherwise(place: int, a: Tensor) -> None:
            noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(len(ids)))
            on_layer(place, a * (1 + noise / 4))

        read(self, ids, otherwise, layers)

    monkeypatch.setattr(NeuronReader, "read", rounded)
    run = profile(spec_of(folder, data_of(corpus), tmp_path / "run", probes=("uncertainty",), layers=(0,)))
    found = rows_of(run, "hu1")
    assert {value for (_, param), value in found.items() if "control=identical" in param} == {0.0}
    assert found[0, "control=shuffled,r=0.2"] > 0.1


def test_values_lie_in_their_ranges(probed: ProfileRun) -> None:
    shares = rows_of(probed, "si3")
    for layer in range(LAYERS):
        assert sum(value for (at, _), value in shares.items() if at == layer) == pytest.approx(1.0)
    union = rows_of(probed, "union")
    kept = math.floor(0.2 * FFN + 0.5) / FFN
    assert union[0, "b=1,r=0.2"] == pytest.approx(kept)
    assert all(union[0, f"b={a},r=0.2"] <= union[0, f"b={b},r=0.2"] for a, b in itertools.pairwise(SIZES))
    for metric in ("overlap_w", "si2_j", "kappa_u"):
        assert {value for (_, p), value in rows_of(probed, metric).items() if "rung=repeat" in p} == {None}
    assert 0.5 < rows_of(probed, "hu2_shuffled")[None, "r=0.2"] < 1.1


def activations(loaded: LoadedModel, ids: Tensor, layer: int) -> Tensor:
    """Neuron activations of sequences, each fed alone: [sequences, positions, neurons]."""
    kept: list[Tensor] = []
    with tapped(loaded.sites, {SiteKind.NEURON: lambda _site, a: kept.append(a.clone())}, (layer,)), torch.no_grad():
        for row in ids:
            loaded.model(input_ids=row[None], use_cache=False)
    return torch.cat(kept)


def top_sets(loaded: LoadedModel, ids: Tensor, layer: int, density: float) -> list[list[set[int]]]:
    """The set of active neurons at every position, the slow way."""
    norms = loaded.sites.layers[layer].down_matrix(FFN).norm(dim=0)
    scores = activations(loaded, ids, layer).abs() * norms
    k = math.floor(density * FFN + 0.5)
    return [[set(row.topk(k).indices.tolist()) for row in sequence] for sequence in scores]


def popularity_chance(loaded: LoadedModel, blocks: Tensor, layer: int, density: float) -> float:
    sets = top_sets(loaded, blocks, layer, density)
    tokens = [one for sequence in sets for one in sequence[SINK:]]
    shared = [len(one & other) for one, other in itertools.combinations(tokens, 2)]
    return sum(shared) / len(shared) / math.floor(density * FFN + 0.5)


def test_masks_of_one_size_have_one_chance_level_whatever_the_pair(probed: ProfileRun) -> None:
    for metric, pop in (("e_uniform", ""), ("e_pop", "pop=nat,"), ("e_pop", "pop=own,")):
        found = rows_of(probed, metric)
        for layer, kind in itertools.product((*range(LAYERS), None), PAIRS):
            where = f"{pop}r=0.2,rung=natural"
            assert found[layer, f"pairs={kind},{where}"] == pytest.approx(found[layer, where], rel=1e-5)


def test_popularity_is_that_of_the_calibration_blocks(probed: ProfileRun, loaded: LoadedModel, texts) -> None:
    assert torch.equal(texts.calibration, texts.pool[N : 2 * N])
    found = rows_of(probed, "e_pop")
    for layer, density in itertools.product(range(LAYERS), (0.2, 0.5)):
        naive = popularity_chance(loaded, texts.pool[N : 2 * N], layer, density)
        assert found[layer, f"pop=nat,r={density},rung=natural"] == pytest.approx(naive, abs=1e-4)
    spread = texts.spread()[:, :PROMPT]
    own = popularity_chance(loaded, spread, 1, 0.2)
    assert found[1, "pop=own,r=0.2,rung=natural"] == pytest.approx(own, abs=1e-4)


def test_overlaps_are_those_of_pairs_counted_one_by_one(probed: ProfileRun, loaded: LoadedModel, texts) -> None:
    step = len(texts.pool) // 8
    ids = texts.pool[[i * step for i in range(8)], :PROMPT]
    sets = top_sets(loaded, ids, 1, 0.2)
    k, positions = math.floor(0.2 * FFN + 0.5), range(SINK, PROMPT)

    def mean(pairs: list[tuple[int, int, int, int]]) -> float:
        kept = [(a, i, b, j) for a, i, b, j in pairs if ids[a, i] != ids[b, j]]
        return sum(len(sets[a][i] & sets[b][j]) / k for a, i, b, j in kept) / len(kept)

    within = mean([(a, i, a, j) for a in range(8) for i in positions for j in positions if j - i >= 8])
    between = mean([(a, i, b, i) for a in range(8) for b in range(8) if a != b for i in positions])
    neighbour = mean([(a, i, a, i + 1) for a in range(8) for i in positions if i + 1 < PROMPT])
    where = (1, "r=0.2,rung=natural")
    assert rows_of(probed, "overlap_w")[where] == pytest.approx(within, abs=1e-4)
    assert rows_of(probed, "overlap_b")[where] == pytest.approx(between, abs=1e-4)
    assert rows_of(probed, "overlap_neighbour")[where] == pytest.approx(neighbour, abs=1e-4)
    chance = k / FFN
    corrected = (within - chance) / (1 - chance)
    assert rows_of(probed, "kappa_u")[1, "pairs=within,r=0.2,rung=natural"] == pytest.approx(corrected, abs=1e-4)
    excess = (within - between) / (1 - chance)
    assert rows_of(probed, "si2_j")[where] == pytest.approx(excess, abs=1e-4)
    popular = popularity_chance(loaded, texts.pool[N : 2 * N], 1, 0.2)
    assert rows_of(probed, "si2_j")[1, "pop=nat,r=0.2,rung=natural"] == pytest.approx(
        (within - between) / (1 - popular), abs=1e-4
    )


def test_hu1_is_that_of_contexts_fed_one_by_one(probed: ProfileRun, loaded: LoadedModel, texts) -> None:
    contexts = texts.contexts
    assert contexts.tokens.shape[1] == 65
    assert set(contexts.tokens[:, 0].tolist()) == {loaded.tokenizer.bos_token_id}
    last = [sequence[-1] for sequence in top_sets(loaded, contexts.tokens, 1, 0.2)]
    k, types = math.floor(0.2 * FFN + 0.5), contexts.types.tolist()
    chance, by_type = k / FFN, []
    for token in dict.fromkeys(types):
        rows = [i for i, one in enumerate(types) if one == token]
        kappas = [(len(last[i] & last[j]) / k - chance) / (1 - chance) for i, j in itertools.combinations(rows, 2)]
        by_type.append(sum(kappas) / len(kappas))
    naive = 1 - sum(by_type) / len(by_type)
    assert rows_of(probed, "hu1")[1, "r=0.2"] == pytest.approx(naive, abs=1e-4)


def test_the_matrices_of_the_2x2_are_kept(probed: ProfileRun, texts) -> None:
    arrays = load_file(str(probed.path / "probes.safetensors"))
    sentences = texts.sentences
    assert len(sentences) >= 5
    ends = texts.ends(torch.cat(sentences))
    assert int(ends.sum()) == len(sentences)
    assert sum(map(len, sentences)) < texts.max_positions
    assert len(arrays) == 2 * 2 * 2 * 2
    for name, matrices in arrays.items():
        assert matrices.shape == (3, len(sentences), len(sentences))
        torch.testing.assert_close(matrices, matrices.mT)
        torch.testing.assert_close(matrices[:, 0, 0], torch.ones(3)), name
    band = rows_of(probed, "matrix_2x2")[None, "band=late,feed=parallel,r=0.2,text=real"]
    late = arrays["matrix_2x2.real.parallel.r0.2"][2]
    off = ~torch.eye(len(late), dtype=torch.bool)
    assert band == pytest.approx(float(late[off].mean()), abs=1e-5)


def test_the_four_arms_differ(probed: ProfileRun) -> None:
    arrays = load_file(str(probed.path / "probes.safetensors"))
    assert not torch.equal(arrays["matrix_2x2.real.parallel.r0.2"], arrays["matrix_2x2.real.sequential.r0.2"])
    assert not torch.equal(arrays["matrix_2x2.real.parallel.r0.2"], arrays["matrix_2x2.random.parallel.r0.2"])


@pytest.mark.parametrize(
    ("task", "after", "finished"),
    [
        ("inertia: texts that lose meaning (SI2)", 4, ["uncertainty"]),
        ("union: neurons of a batch", 1, ["uncertainty", "inertia"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_rows(
    task: str, after: int, finished: list[str], probed: ProfileRun, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    spec = spec_of(folder, data_of(corpus), tmp_path / "cut", probes=BY_DEFAULT)
    with pytest.raises(KeyboardInterrupt):
        profile(spec, Listener(task, after))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = Listener()
    resumed = profile(spec, again)
    assert [name for name in PROBES if f"resuming: the probe {name} was finished before" in again.notes] == finished
    assert not any(f"probe {name}" in one for name in finished for one in again.tasks)
    assert resumed.measures.equals(probed.measures)
    assert (resumed.path / "probes.safetensors").read_bytes() == (probed.path / "probes.safetensors").read_bytes()
    assert not (resumed.path / "shards").exists()


def test_a_profile_without_probes_has_none_of_their_rows(
    folder: Path, corpus: Path, probed: ProfileRun, tmp_path: Path
) -> None:
    plain = profile(spec_of(folder, data_of(corpus), tmp_path / "plain"))
    names = set(plain.measures["metric"])
    assert names.isdisjoint({*INTERVALS, *PLAIN, "si1", "union"})
    assert not (plain.path / "probes.safetensors").exists()
    assert plain.measures.equals(probed.measures.head(plain.measures.height))


def test_chosen_layers_are_the_ones_probed(folder: Path, corpus: Path, probed: ProfileRun, tmp_path: Path) -> None:
    run = profile(spec_of(folder, data_of(corpus), tmp_path / "one", layers=(1,), probes=("union", "uncertainty")))
    both = rows_of(probed, "hu1")
    for key, value in rows_of(run, "hu1").items():
        assert value == both[1, key[1]]
    assert set(run.measures["layer"].drop_nulls().to_list()) == {1}


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_non_gated_families_and_prompts(family: str, tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    data = DataSpec(prompts=(str(prompts_file),), block_length=32, prompt_length=16)
    listener = Listener()
    run = profile(spec_of(tiny_folder(family), data, tmp_path / "p", probes=("inertia",)), listener)
    assert len(rows_of(run, "overlap_w")) == len(RUNGS) * 2 * (LAYERS + 1)
    assert rows_of(run, "overlap_w")[0, "r=0.2,rung=natural"] is not None
    # the tiny tokenizer has no full stop, so there is no sentence
    assert rows_of(run, "matrix_2x2") == {}
    assert any("no sentences" in note for note in listener.notes)


def test_a_union_counts_one_token_of_every_sequence(probed: ProfileRun) -> None:
    """Of masks that never meet, two take twice as many neurons."""
    masks = torch.eye(4, dtype=torch.bool)
    assert batch_union(masks.int(), 1).measured == pytest.approx((0.25, 0.5, 0.75, 1.0))
    found = rows_of(probed, "union_uniform")
    kept = math.floor(0.2 * FFN + 0.5) / FFN
    assert found[None, "b=3,r=0.2"] == pytest.approx(1 - (1 - kept) ** 3)


def test_an_unknown_probe_names_the_nearest(folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ActsparseError, match="no probe 'inertai'") as caught:
        profile(spec_of(folder, data_of(corpus), tmp_path / "p", probes=("inertai",)))
    assert "did you mean 'inertia'?" in caught.value.hint
    assert not (tmp_path / "p").exists()
    with pytest.raises(ActsparseError) as unlike:
        probe_names(["xyz"])
    assert "did you mean" not in unlike.value.hint
    assert all(name in unlike.value.hint for name in PROBES)


def test_names_are_put_in_order_and_once() -> None:
    assert probe_names(["union", " inertia", "union", ""]) == ("inertia", "union")
    assert probe_names([]) == probe_names(["none"]) == ()
    assert probe_names(["all"]) == tuple(PROBES)
    assert probe_names(["gradients", "default"]) == ("default", "gradients")


def test_sets_of_probes_depend_on_the_size_of_the_model() -> None:
    assert chosen(("default",), 10**12) == BY_DEFAULT
    assert chosen(("cheap",), CHEAP_PARAMETERS) == BY_DEFAULT
    assert chosen(("cheap",), CHEAP_PARAMETERS + 1) == ()
    assert chosen(("cheap", "gradients"), 10**12) == ("gradients",)


def test_default_probes_give_way_where_the_text_is_short(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(sentences_text(70, seed=1))
    listener = Listener()
    run = profile(spec_of(folder, data_of(short), tmp_path / "p", probes=("default",)), listener)
    assert any("the probes uncertainty are left out: no token of" in note for note in listener.notes)
    assert rows_of(run, "overlap_w")
    assert not rows_of(run, "hu1")
    assert run.manifest.spec["probes"] == ["inertia", "union"]


def test_the_line_about_what_was_left_out() -> None:
    assert "--probes inertia,union,gradients" in left_out(["uncertainty"])
    assert "HU4 and M2, from backward passes (--gradients)" in left_out(BY_DEFAULT)
    assert "--masks" not in left_out(BY_DEFAULT, ["topk", "cett", "exact"])
    assert "masks by cett, exact (--masks all)" in left_out(BY_DEFAULT, ["topk"])
    assert "--probes" not in left_out(PROBES)
    assert "HU3" in left_out(PROBES)


def test_too_little_text_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(sentences_text(70, seed=1))
    with pytest.raises(DataError, match="two contexts"):
        profile(spec_of(folder, data_of(short), tmp_path / "p", probes=("uncertainty",)))
    assert not (tmp_path / "p").exists()


def test_few_blocks_are_warned_about(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(sentences_text(BLOCK, seed=1))
    run = profile(spec_of(folder, data_of(short), tmp_path / "p", probes=("inertia",)))
    assert any("1 sequences" in text for text in run.warnings)
    assert any("popularity is measured on the text that it corrects" in text for text in run.warnings)
    assert rows_of(run, "overlap_b")[0, "r=0.2,rung=natural"] is None
    assert rows_of(run, "overlap_w")[0, "r=0.2,rung=natural"] is not None


def test_another_calibration_text_and_a_range_are_used(loaded: LoadedModel, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(sentences_text(600, seed=9))

    def texts_with(**options: object):
        reader = TextReader(data_of(corpus, **options), loaded.tokenizer, None, lambda _line: None)
        return probe_texts(reader, (), loaded.record.vocab_size)

    own = texts_with()
    given = texts_with(calib=str(other))
    assert given.calibration.shape == (N, BLOCK)
    assert given.calibration_sha256 != own.calibration_sha256
    ranged = texts_with(calib_blocks=(2, 5))
    assert torch.equal(ranged.calibration, own.pool[2:5])
    with pytest.raises(DataError, match="not all there"):
        texts_with(calib_blocks=(2, 500))


class TestCommand:
    def test_probes_are_chosen_and_the_rest_is_named(
        self, folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["profile", "-m", str(folder), "--corpus", str(corpus), "-n", "4", "--block-length", "64"]
        assert main([*argv, "--probes", "union", "-o", str(tmp_path / "p")]) == 0
        said = capsys.readouterr()
        assert "left out: HU1 with its controls" in said.err.replace("\n", " ")
        assert "left out" not in said.out
        assert rows_of(ProfileRun.open(tmp_path / "p"), "union")

    def test_an_unknown_probe_is_an_error_with_the_nearest(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["profile", "-m", str(folder), "--probes", "uncertanty", "-o", str(tmp_path / "p")]) == 1
        said = capsys.readouterr()
        assert "no probe 'uncertanty'" in said.err
        assert "did you mean 'uncertainty'" in said.err
        assert not (tmp_path / "p").exists()


def test_the_twin_shows_that_tokens_decide_more_than_histories(tmp_path: Path) -> None:
    heldout = Path(twins.__file__).parent / "heldout.jsonl"
    data = DataSpec(prompts=(str(heldout),), limit=12)
    spec = ProfileSpec(
        model=ModelSpec(name="demo", device="cpu"), data=data, layers=(4,), output=tmp_path / "p",
        cett_targets=(0.2,), reservoir_tokens=64, probes=("uncertainty", "inertia"),
    )  # fmt: skip
    run = profile(spec)
    hu1, low = rows_of(run, "hu1"), rows_of(run, "hu1_low")
    assert hu1[None, "control=identical,r=0.2"] == 0.0
    assert hu1[None, "r=0.2"] < low[None, "control=other-token,r=0.2"]
    assert hu1[None, "control=shuffled,r=0.2"] < hu1[None, "control=random,r=0.2"]
    assert 0 < rows_of(run, "history_share")[None, "pop=nat,r=0.2"] < 0.5
    assert rows_of(run, "si2_j_low")[None, "r=0.2,rung=natural"] > 0


def kappa_u(first: set[int], second: set[int]) -> float:
    """Overlap of two sets of neurons above uniform chance, by its definition."""
    overlap, chance = len(first & second) / min(len(first), len(second)), max(len(first), len(second)) / FFN
    return (overlap - chance) / (1 - chance)


def test_overlaps_by_distance_are_those_of_pairs_counted_one_by_one(
    probed: ProfileRun, loaded: LoadedModel, texts
) -> None:
    ids = texts.spread()
    for distance in (1, 8):
        layers: dict[str, list[float]] = {"raw": [], "kappa": []}
        for layer in range(LAYERS):
            raw, kappas = [], []
            for sequence, masks in zip(ids.tolist(), top_sets(loaded, ids, layer, 0.2), strict=True):
                for at in range(SINK, BLOCK - distance):
                    if sequence[at] != sequence[at + distance]:
                        first, second = masks[at], masks[at + distance]
                        raw.append(len(first & second) / min(len(first), len(second)))
                        kappas.append(kappa_u(first, second))
            layers["raw"].append(sum(raw) / len(raw))
            layers["kappa"].append(sum(kappas) / len(kappas))
        mean = {name: sum(values) / LAYERS for name, values in layers.items()}
        assert rows_of(probed, "overlap_distance")[None, f"d={distance},r=0.2"] == pytest.approx(mean["raw"], abs=1e-3)
        found = rows_of(probed, "kappa_u")[None, f"d={distance},pairs=distance,r=0.2"]
        assert found == pytest.approx(mean["kappa"], abs=1e-3)


@pytest.mark.parametrize("prefix", [1, 8, 32])
def test_prefix_curves_are_those_of_masks_compared_one_by_one(
    prefix: int, probed: ProfileRun, loaded: LoadedModel, texts
) -> None:
    ids = texts.spread()
    k = math.floor(0.2 * FFN + 0.5)
    for layer in range(LAYERS):
        kappas = []
        for a, masks in zip(activations(loaded, ids, layer), top_sets(loaded, ids, layer, 0.2), strict=True):
            rows = a[SINK : SINK + prefix].double()
            statistic = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).sum(dim=0)
            chosen = set(statistic.topk(k).indices.tolist())
            kappas += [kappa_u(chosen, mask) for mask in masks[SINK + prefix :]]
        assert rows_of(probed, "si1")[layer, f"p={prefix},r=0.2"] == pytest.approx(sum(kappas) / len(kappas), abs=1e-3)


def entropy(count: int, n: int) -> float:
    """Of a binary variable in nats, with Miller and Madow's (outcomes seen - 1) / (2 n)."""
    shares = [share for share in (count / n, 1 - count / n) if share > 0]
    return -math.fsum(p * math.log(p) for p in shares) + (len(shares) - 1) / (2 * n)


def test_hu2_is_that_of_entropies_counted_one_by_one(probed: ProfileRun, loaded: LoadedModel, texts) -> None:
    blocks = texts.history_blocks
    tokens = [token for row in blocks.tolist() for token in row[SINK:]]
    frequent = {token for token in tokens if tokens.count(token) >= 50}
    for layer in range(LAYERS):
        masks = [mask for row in top_sets(loaded, blocks, layer, 0.2) for mask in row[SINK:]]
        seen = [(token, mask) for token, mask in zip(tokens, masks, strict=True) if token in frequent]
        total, conditional = 0.0, 0.0
        for neuron in range(FFN):
            total += entropy(sum(neuron in mask for _, mask in seen), len(seen))
            for kind in frequent:
                mine = [neuron in mask for token, mask in seen if token == kind]
                conditional += len(mine) / len(seen) * entropy(sum(mine), len(mine))
        assert rows_of(probed, "hu2_uncorrected")[layer, "r=0.2"] == pytest.approx(conditional / total, abs=2e-3)
        parts = [rows_of(probed, name)[layer, "r=0.2"] for name in ("hu2_uncorrected", "hu2_shuffled")]
        assert rows_of(probed, "hu2")[layer, "r=0.2"] == pytest.approx(parts[0] + 1 - parts[1], abs=1e-9)


def test_variance_shares_are_those_of_regressions_one_after_the_other(
    probed: ProfileRun, loaded: LoadedModel, texts
) -> None:
    ids = texts.spread()
    tokens = ids[:, SINK:].flatten()
    sequences = torch.arange(len(ids)).repeat_interleave(BLOCK - SINK)
    types = [token for token in tokens.unique().tolist() if int((tokens == token).sum()) >= 8]
    places = torch.arange(BLOCK - SINK).repeat(len(ids)) * 8 // (BLOCK - SINK)
    designs = [torch.ones(len(tokens), 1)]
    for levels, of in ((range(len(ids)), sequences), (types, tokens), (range(8), places)):
        designs.append(torch.cat([designs[-1], torch.stack([(of == level).float() for level in levels], dim=1)], dim=1))
    a = activations(loaded, ids, 0)[:, SINK:].flatten(0, 1).double()
    y = (1e-4 + a.abs() / a.norm(dim=1, keepdim=True)).log()
    total = float((y - y.mean()).square().sum())
    left = [total]
    for design in designs:
        x = design.double()
        left.append(float((y - x @ (torch.linalg.pinv(x) @ y)).square().sum()))
    shares = [(before - after) / total for before, after in itertools.pairwise(left)] + [left[-1] / total]
    names = ("neuron", "sequence", "token_type", "position", "residual")
    for name, share in zip(names, shares, strict=True):
        assert rows_of(probed, "si3")[0, f"factor={name}"] == pytest.approx(share, abs=1e-4), name
