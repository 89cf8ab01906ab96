"""Masks of every kind in the probes: those of CETT and exact zeros differ in size, and so do their chance levels."""

import itertools
import math
from pathlib import Path

import polars as pl
import pytest
import torch
from test_probes_profile import SINK, activations, data_of, rows_of, sentences_text, spec_of
from tiny import FFN, save_tiny
from torch import Tensor

from actsparse.cli.app import main
from actsparse.core.mask_rules import MaskKind, MaskRule, mask_kinds, mask_rules
from actsparse.core.overlap import mean_larger
from actsparse.data.texts import TextReader
from actsparse.errors import ActsparseError
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.probes.text import ProbeTexts, probe_texts
from actsparse.pipelines.profile import profile
from actsparse.specs import ModelSpec
from actsparse.store.runs import ProfileRun

PROMPT, N = 32, 8
RULES = {"masks=cett": MaskKind.CETT, "masks=exact": MaskKind.EXACT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLU model: its exact masks leave neurons out. Its tokenizer knows the full stop."""
    made = save_tiny("opt", tmp_path_factory.mktemp("models") / "relu")
    file = made / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"."'))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(sentences_text(1400, seed=3))
    return path


@pytest.fixture(scope="module")
def probed(folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    out = tmp_path_factory.mktemp("runs") / "masks"
    probes = ("union", "inertia", "uncertainty")
    return profile(spec_of(folder, data_of(corpus), out, probes=probes, masks=("topk", "cett", "exact")))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSpec(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel, corpus: Path) -> ProbeTexts:
    reader = TextReader(data_of(corpus), loaded.tokenizer, loaded.record.max_positions, lambda _line: None)
    return probe_texts(reader, ("uncertainty",), loaded.record.vocab_size)


def masks_of(run: ProfileRun, loaded: LoadedModel, ids: Tensor, layer: int, kind: MaskKind) -> list[list[set[int]]]:
    """The set of active neurons at every position, the slow way, with the threshold that the profile reports."""
    a = activations(loaded, ids, layer)
    eps = rows_of(run, "cett_eps")[layer, "target=0.2"]
    scores = a.abs() * loaded.sites.layers[layer].down_matrix(FFN).norm(dim=0)
    active = (scores >= eps) & (scores > 0) if kind is MaskKind.CETT else a != 0
    return [[set(row.nonzero().flatten().tolist()) for row in sequence] for sequence in active]


def mean_kappa(pairs: list[tuple[set[int], set[int]]], rate: float) -> float:
    """The mean of (o - E) / (1 - E) over pairs of masks, each with its own E."""
    values = []
    for first, second in pairs:
        if first and second:
            chance = rate * max(len(first), len(second))
            values.append((len(first & second) / min(len(first), len(second)) - chance) / (1 - chance))
    return sum(values) / len(values)


@pytest.mark.parametrize("where", RULES)
def test_kappas_have_the_chance_level_of_each_pair(
    where: str, probed: ProfileRun, loaded: LoadedModel, texts: ProbeTexts
) -> None:
    step = len(texts.pool) // 8
    ids = texts.pool[[i * step for i in range(8)], :PROMPT]
    masks = masks_of(probed, loaded, ids, 1, RULES[where])
    assert len({len(one) for row in masks for one in row[SINK:]}) > 5
    popular = [mask for row in masks_of(probed, loaded, texts.calibration, 1, RULES[where]) for mask in row[SINK:]]
    tokens = list(itertools.combinations(popular, 2))
    rates = {"": 1 / FFN, "pop=nat,": sum(len(a & b) for a, b in tokens) / sum(len(a) * len(b) for a, b in tokens)}
    places = range(SINK, PROMPT)
    within = [
        (masks[row][i], masks[row][j])
        for row in range(8)
        for i in places
        for j in places
        if j - i >= 8 and ids[row, i] != ids[row, j]
    ]
    between = [(masks[a][i], masks[b][i]) for a in range(8) for b in range(a) for i in places if ids[a, i] != ids[b, i]]
    for pop, rate in rates.items():
        kappas = rows_of(probed, "kappa_p" if pop else "kappa_u")
        for name, pairs in {"within": within, "between": between}.items():
            found = kappas[1, f"{where},pairs={name},{pop}rung=natural"]
            assert found == pytest.approx(mean_kappa(pairs, rate), abs=1e-4)
            chances = [rate * max(len(a), len(b)) for a, b in pairs if a and b]
            level = rows_of(probed, "e_pop" if pop else "e_uniform")[1, f"{where},pairs={name},{pop}rung=natural"]
            assert level == pytest.approx(sum(chances) / len(chances), abs=1e-5)


@pytest.mark.parametrize("where", RULES)
def test_hu1_compares_masks_of_different_sizes(
    where: str, probed: ProfileRun, loaded: LoadedModel, texts: ProbeTexts
) -> None:
    contexts = texts.contexts
    last = [row[-1] for row in masks_of(probed, loaded, contexts.tokens, 0, RULES[where])]
    types, by_type = contexts.types.tolist(), []
    for token in dict.fromkeys(types):
        mine = [last[i] for i, one in enumerate(types) if one == token]
        by_type.append(mean_kappa(list(itertools.combinations(mine, 2)), 1 / FFN))
    assert rows_of(probed, "hu1")[0, where] == pytest.approx(1 - sum(by_type) / len(by_type), abs=1e-4)


@pytest.mark.parametrize("where", RULES)
def test_a_prefix_keeps_as_many_neurons_as_its_tokens_do_on_average(
    where: str, probed: ProfileRun, loaded: LoadedModel, texts: ProbeTexts
) -> None:
    ids, kappas = texts.spread(), []
    masks = masks_of(probed, loaded, ids, 1, RULES[where])
    for a, own in zip(activations(loaded, ids, 1), masks, strict=True):
        rows = a[SINK : SINK + 8].double()
        k = max(1, math.floor(sum(map(len, own[SINK : SINK + 8])) / 8 + 0.5))
        chosen = set((rows / rows.norm(dim=1, keepdim=True)).square().sum(dim=0).topk(k).indices.tolist())
        kappas += [mean_kappa([(chosen, mask)], 1 / FFN) for mask in own[SINK + 8 :] if mask]
    assert rows_of(probed, "si1")[1, f"{where},p=8"] == pytest.approx(sum(kappas) / len(kappas), abs=2e-3)


@pytest.mark.parametrize("metric", ["hu1", "hu2", "overlap_w", "kappa_p", "sir", "si1_p90", "union", "matrix_2x2"])
def test_every_row_of_a_density_has_one_for_each_other_kind(metric: str, probed: ProfileRun) -> None:
    rows = rows_of(probed, metric)
    named = {
        kind: {(layer, ",".join(sorted(param.replace(part, "").split(",")))) for layer, param in rows if part in param}
        for kind, part in {"r": "r=0.2", **{name: name for name in RULES}}.items()
    }
    assert named["r"]
    assert named["r"] == named["masks=cett"] == named["masks=exact"]


def test_other_kinds_leave_the_rows_of_topk_alone(
    probed: ProfileRun, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    alone = profile(spec_of(folder, data_of(corpus), tmp_path / "topk", probes=("inertia",)))
    for metric in ("overlap_w", "si2_j"):
        both = {key: value for key, value in rows_of(probed, metric).items() if "masks=" not in key[1]}
        assert rows_of(alone, metric) == both


def test_the_chance_level_of_masks_is_that_of_the_larger_of_two() -> None:
    masks = torch.zeros(4, 10, dtype=torch.bool)
    for row, size in enumerate((3, 0, 7, 3)):
        masks[row, :size] = True
    sizes = [max(a, b) for a, b in itertools.combinations((3, 0, 7, 3), 2)]
    assert mean_larger(masks) == pytest.approx(sum(sizes) / len(sizes))
    assert math.isnan(mean_larger(masks[:1]))


def test_cett_masks_need_their_level_solved(folder: Path, corpus: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, data_of(corpus), tmp_path / "p", probes=("union",), masks=("cett",), layers=(1,))
    run = profile(type(spec)(**{name: getattr(spec, name) for name in spec.__slots__} | {"cett_targets": (0.4,)}))
    solved = run.measures.filter(pl.col("metric") == "cett_eps")["param"].to_list()
    assert solved == ["target=0.2", "target=0.4"]
    assert rows_of(run, "union")[1, "b=1,masks=cett"] is not None
    assert not [param for _, param in rows_of(run, "union") if "r=" in param]


def test_kinds_are_named() -> None:
    assert mask_kinds(["exact", "topk"]) == ("topk", "exact")
    assert mask_kinds(["all"]) == ("topk", "cett", "exact")
    assert mask_rules(["cett"]) == (MaskRule(MaskKind.CETT),)
    with pytest.raises(ActsparseError, match="no masks 'cet'") as raised:
        mask_kinds(["cet"])
    assert "did you mean 'cett'" in raised.value.hint


def test_exact_masks_of_a_model_without_zeros_are_warned_about(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = save_tiny("llama", tmp_path / "silu")
    line = ["profile", "-m", str(made), "--corpus", str(corpus), "--block-length", "64", "--probes", "union"]
    assert main([*line, "--masks", "exact", "--device", "cpu", "-o", str(tmp_path / "run")]) == 0
    assert "makes no zeros" in capsys.readouterr().err
    assert main([*line, "--masks", "excat", "-o", str(tmp_path / "other")]) == 1
    assert "did you mean 'exact'" in capsys.readouterr().err
