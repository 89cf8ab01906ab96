"""Studies: their numbers against the naive loop of the quality tests, and how they resume, refuse and conclude."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path

import polars as pl
import pytest
import torch
from test_quality import BLOCK, PROMPT, SINK, naive_block, neuron_inputs
from tiny import FFN, HEADS, LAYERS, make_tokenizer, save_tiny, words
from torch import Tensor

from actsparse.cli.app import main
from actsparse.core.bootstrap import Interval
from actsparse.core.ladder import ordinary_ids, random_tokens
from actsparse.data.texts import TextReader
from actsparse.engine.choose import Engines
from actsparse.errors import ActsparseError, DataError, ModelError, PlanError
from actsparse.methods.plan import Plan
from actsparse.methods.tda import Tda
from actsparse.models.families import FAMILIES
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.studies import bench as bench_module
from actsparse.pipelines.studies import donors, frontier, heads, routers, sensitivity, speed
from actsparse.pipelines.studies.outcome import above, below
from actsparse.pipelines.studies.registry import STUDIES, runners
from actsparse.pipelines.studies.run import study
from actsparse.pipelines.studies.scores import FIELDS, Scored
from actsparse.results import ClaimVerdict, PanelKind, SiteKind
from actsparse.specs import DataSpec, ModelSpec, StudySpec
from actsparse.store.runs import StudyRun

N = 3


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(words(2000, seed=9))
    return path


def spec_of(folder: Path, corpus: Path, output: Path, name: str, *only: str, **changes: object) -> StudySpec:
    data = DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT)
    model = ModelSpec(name=str(folder), device="cpu")
    return replace(StudySpec(study=name, model=model, data=data, only=only, quick=True, output=output), **changes)


def point(run: StudyRun, panel: str, series: str, **where: object) -> float:
    rows = run.rows.filter((pl.col("panel") == panel) & (pl.col("series") == series))
    for column, value in where.items():
        rows = rows.filter(pl.col(column) == value)
    assert rows.height == 1, rows
    return rows["value"][0]


def pool_of(loaded: LoadedModel, corpus: Path) -> Tensor:
    data = DataSpec(corpus=str(corpus), block_length=BLOCK, prompt_length=PROMPT)
    return TextReader(data, loaded.tokenizer, None, lambda _line: None).profile_sequences().stack()


def mask_of(loaded: LoadedModel, ids: Tensor, tokens: slice) -> list[Tensor]:
    """GRIFFIN's masks at density 0.5 from some positions of a text."""
    with torch.no_grad():
        acts = neuron_inputs(loaded.model, lambda: loaded.model(input_ids=ids[None], use_cache=False))
    masks = []
    for a in acts:
        rows = a[tokens].double()
        s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
        masks.append(torch.zeros(FFN, dtype=torch.bool).index_fill_(0, s.topk(FFN // 2).indices, True))
    return masks


def test_the_donor_swap_equals_a_naive_loop(
    tiny_loaded: Callable, tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    loaded = tiny_loaded("llama")
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s", "moyu", "M5"))
    pool = pool_of(loaded, long_corpus)
    donors = {
        "own prompt": lambda b: mask_of(loaded, pool[b, :PROMPT], slice(SINK, None)),
        "next block": lambda b: mask_of(loaded, pool[b + 1, :PROMPT], slice(SINK, None)),
        "far block": lambda b: mask_of(loaded, pool[b + len(pool) // 2, :PROMPT], slice(SINK, None)),
        "own continuation": lambda b: mask_of(loaded, pool[b], slice(PROMPT, None)),
    }
    ordinary = ordinary_ids(len(loaded.tokenizer), loaded.tokenizer.all_special_ids)
    draws = [random_tokens(pool[:N], ordinary, seed=seed)[:, :PROMPT] for seed in range(3)]
    random = [
        naive_block(loaded, pool[b], mask_of(loaded, draw[b], slice(SINK, None)))["nll"]
        for b in range(N)
        for draw in draws
    ]
    assert point(run, "ppl", "perplexity", label="random tokens") == pytest.approx(
        exp(float(torch.stack(random).mean())), rel=1e-4
    )
    nll = {}
    for donor, masks in donors.items():
        nll[donor] = torch.stack([naive_block(loaded, pool[b], masks(b))["nll"] for b in range(N)])
        assert point(run, "ppl", "perplexity", label=donor) == pytest.approx(exp(float(nll[donor].mean())), rel=1e-4)
        difference = float((nll[donor] - nll["own prompt"]).mean())
        assert point(run, "delta", "difference to own", label=donor) == pytest.approx(difference, abs=1e-4)
    experiment = run.experiments[0]
    assert experiment.conclusion.startswith("Quick: ")
    # on random weights the oracle gains nothing for sure, so there is nothing to be captured
    assert point(run, "captured", "over static (headline)", label="next block") is None
    assert experiment.value is None
    assert experiment.verdict is ClaimVerdict.UNDECIDED


def test_windows_and_first_tokens_end_in_the_decode_regime(
    tiny_loaded: Callable, tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    loaded = tiny_loaded("llama")
    pool = pool_of(loaded, long_corpus)
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "t", "tda", "T4"))
    own = torch.stack([naive_block(loaded, pool[b], None)["nll"] for b in range(N)])
    whole = float(PROMPT - SINK)
    assert point(run, "ppl", "mask of the first tokens", x=whole) == pytest.approx(exp(float(own.mean())), rel=1e-4)
    first = torch.stack([
        naive_block(loaded, pool[b], mask_of(loaded, pool[b, :PROMPT], slice(SINK, SINK + 4)))["nll"] for b in range(N)
    ])  # fmt: skip
    assert point(run, "ppl", "mask of the first tokens", x=4.0) == pytest.approx(exp(float(first.mean())), rel=1e-4)
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "w", "window"))
    half = BLOCK // 2
    assert half > PROMPT
    with torch.no_grad():
        logits = loaded.model(input_ids=pool[:N, :-1]).logits.log_softmax(-1)
    dense = -logits.gather(2, pool[:N, 1:, None])[..., 0]
    losses = []
    for b in range(N):
        masks = mask_of(loaded, pool[b, :half], slice(SINK, None))
        losses.append(sparse_nll(loaded, pool[b], masks, half) - dense[b, half - 1 :])
    assert point(run, "sparse", "griffin@0.5", label="50%") == pytest.approx(
        float(torch.stack(losses).mean()), abs=1e-4
    )


def sparse_nll(loaded: LoadedModel, ids: Tensor, masks: list[Tensor], dense: int) -> Tensor:
    """NLL of tokens `dense`..S-1 in one pass whose first positions are dense, by hooks of the test's own."""
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, kept=mask: (
                torch.cat([args[0][:, :dense], torch.where(kept, args[0][:, dense:], 0.0)], dim=1),
            )
        )
        for layer, mask in zip(loaded.model.model.layers, masks, strict=True)
    ]
    with torch.no_grad():
        logits = loaded.model(input_ids=ids[None, :-1]).logits[0, dense - 1 :].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return -logits.gather(1, ids[dense:, None])[:, 0]


@pytest.mark.parametrize("name", ["tda", "pitfalls", "moyu", "frontier", "union"])
def test_every_experiment_draws_its_panels_and_concludes(
    name: str, tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    names = [one.of.name for one in STUDIES[name] if one.of.name != "M5"]
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s", name, *names))
    assert [one.experiment for one in run.experiments] == names
    for one in run.experiments:
        assert not one.conclusion.startswith("Quick: not measured"), one.conclusion
        assert one.quick
        rows = run.rows.filter(pl.col("experiment") == one.experiment)
        assert set(rows["panel"]) == {panel.name for panel in one.panels}
        assert rows["value"].null_count() < rows.height
        for panel in one.panels:
            mine = rows.filter(pl.col("panel") == panel.name)
            assert (mine["x"].null_count() == 0) is (panel.kind is PanelKind.LINE)
            if panel.layers:
                assert set(mine["x"]) == set(range(LAYERS))
            if panel.kind is not PanelKind.LINE:
                assert "" not in set(mine["label"])


def test_equal_density_and_equal_bytes_are_equal(tiny_folder: Callable, long_corpus: Path, tmp_path: Path) -> None:
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "t", "tda", "T3"))
    means = {
        series: rows["value"].mean()
        for (series,), rows in run.rows.filter(pl.col("panel") == "density").group_by(["series"])
    }
    assert means["threshold, layer-wise"] == pytest.approx(means["top-k, layer-wise"], abs=1 / FFN)
    seen: list[tuple[str, float, float]] = []
    original = bench_module.Bench.score

    def score(bench: bench_module.Bench, short: str, **options: object) -> object:
        if "@" in short:
            seen.append((short, bench.plan(short).predicted.model_bytes_frac, bench.count))
        return original(bench, short, **options)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module.Bench, "score", score)
        run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "f", "frontier"))
    targets = set(run.rows.filter(pl.col("panel") == "ppl")["x"])
    assert seen
    for short, not_read, _ in seen:
        assert min(abs(not_read - target) for target in targets) < 0.03, (short, not_read)


def test_the_sparsity_of_heads_equals_a_naive_loop(
    tiny_folder: Callable, tiny_loaded: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "p2", "pitfalls", "P2"))
    loaded = tiny_loaded("llama")
    pool, places = pool_of(loaded, long_corpus), torch.linspace(SINK, BLOCK - 1, heads.SAMPLED).long()
    layer = 1
    weight = loaded.sites.layers[layer].output.get_parameter("weight").double()

    def added(ids: Tensor) -> Tensor:
        """What each head adds to the output [positions, heads, hidden]."""
        seen: list[Tensor] = []
        with tapped(loaded.sites, {SiteKind.ATTN_OUT: lambda _s, o: seen.append(o[0])}, (layer,)), torch.no_grad():
            loaded.model(input_ids=ids[None], use_cache=False)
        parts = seen[0][places].double().unflatten(1, (HEADS, -1))
        return torch.stack(
            [part @ own.T for part, own in zip(parts.unbind(1), weight.chunk(HEADS, dim=1), strict=True)], 1
        )

    fitted = torch.cat([added(ids) for ids in pool[N : 2 * N]])

    def error(eps: float) -> float:
        lost = torch.stack([one[one.norm(dim=1) < eps].sum(dim=0) for one in fitted])
        return float((lost.norm(dim=1) / fitted.sum(dim=1).norm(dim=1)).mean())

    norms = fitted.norm(dim=2).flatten().sort().values
    eps = max((float(norm) for norm in norms if error(float(norm)) <= 0.2), default=0.0)
    shares = [float((added(ids).norm(dim=2) < eps).double().mean()) for ids in pool[:N]]
    found = run.rows.filter((pl.col("panel") == "layers") & (pl.col("x") == layer))["value"][0]
    # one head of one scored block may stand between the bisection's threshold and the norm above it
    assert found == pytest.approx(sum(shares) / N, abs=1.5 / (N * heads.SAMPLED * HEADS))


def test_a_study_resumes_where_it_stopped(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "whole", "tda", "T1", "T4"))
    spec = spec_of(tiny_folder("llama"), long_corpus, tmp_path / "cut", "tda", "T1", "T4")
    original, passes = bench_module.Bench._score_block, []

    def score(bench: bench_module.Bench, *given: object) -> object:
        passes.append(given[0])
        if len(passes) == 20:
            raise KeyboardInterrupt
        return original(bench, *given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(bench_module.Bench, "_score_block", score)
    with pytest.raises(KeyboardInterrupt):
        study(spec)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = study(spec)
    # dense, four plans and three seeds for T1, first=1 and first=4 for T4; the pass at work alone is repeated
    assert len(passes) == N * (1 + 4 + 3 + 2) + 1
    assert again.rows.equals(whole.rows)
    assert again.experiments == whole.experiments
    monkeypatch.setattr(bench_module.Bench, "_score_block", lambda *_: pytest.fail("scored again"))
    assert study(spec).experiments == whole.experiments


def test_a_counterpart_is_compared_in_the_direction_of_relu(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    relu = save_tiny("llama", tmp_path / "relu", hidden_act="relu")
    other = ModelSpec(name=str(relu), device="cpu")
    found = []
    for folder, beside in (
        (tiny_folder("llama"), other),
        (relu, ModelSpec(name=str(tiny_folder("llama")), device="cpu")),
    ):
        spec = spec_of(folder, long_corpus, tmp_path / f"s{len(found)}", "pitfalls", "P1", counterpart=beside)
        found.append(study(spec).experiments[0])
    assert found[0].verdict is found[1].verdict is ClaimVerdict.HOLDS
    assert found[0].value == pytest.approx(found[1].value)
    assert found[0].value is not None
    assert found[0].value > 0.03
    alone = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "alone", "pitfalls", "P1")).experiments[0]
    assert alone.verdict is ClaimVerdict.UNDECIDED
    assert any("--counterpart" in note for note in alone.notes)


def test_what_a_model_cannot_serve_is_said_and_the_rest_goes_on(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    run = study(spec_of(tiny_folder("mpt"), long_corpus, tmp_path / "s", "pitfalls", "P1", "P3"))
    first, heads = run.experiments
    assert "not measured" not in first.conclusion
    assert heads.verdict is ClaimVerdict.UNDECIDED
    assert "not measured on this model" in heads.conclusion


def test_bad_requests_are_refused(tiny_folder: Callable, long_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no study 'pitfall'") as error:
        study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s", "pitfall"))
    assert "pitfalls" in error.value.hint
    with pytest.raises(PlanError, match="no experiment 'T9'"):
        runners("tda", ("T9",))
    short = tmp_path / "short.txt"
    short.write_text(words(60, seed=1))
    with pytest.raises(DataError, match="too few"):
        study(spec_of(tiny_folder("llama"), short, tmp_path / "s", "tda"))
    assert issubclass(PlanError, ActsparseError)


def test_the_command_tells_claim_verdict_and_number(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate", "-m", str(tiny_folder("llama")), "--corpus", str(long_corpus), "-n", "2"]
    line += ["--block-length", "40", "--prompt-length", "16", "-o", str(tmp_path / "s")]
    assert main([*line, "--study", "tda", "--only", "T1", "--quick"]) == 0
    found = capsys.readouterr()
    assert "T1 " in found.out
    assert "(quick)" in found.out
    assert "claim: TDA does not" in found.out
    assert "next: actsparse report" in found.err
    assert main([*line, "--study", "tda", "--only", "T1", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["study"] == "tda"
    assert document["experiments"][0]["verdict"] in set(ClaimVerdict)
    # both shares are said, since a threshold and a fixed count drop different ones
    told = document["experiments"][0]["conclusion"]
    assert re.search(r"dropping \d.* of the neurons, TDA loses .* one static mask, which drops 50\.0 %", told), told
    assert main([*line, "--quick"]) == 1
    assert "belongs to a study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "is_below", "is_above"),
    [
        (0.1, 0.2, ClaimVerdict.HOLDS, ClaimVerdict.FAILS),
        (0.4, 0.6, ClaimVerdict.UNDECIDED, ClaimVerdict.UNDECIDED),
        (0.6, 0.9, ClaimVerdict.FAILS, ClaimVerdict.HOLDS),
        (None, None, ClaimVerdict.UNDECIDED, ClaimVerdict.UNDECIDED),
    ],
)
def test_a_verdict_follows_the_whole_interval(
    low: float | None, high: float | None, is_below: ClaimVerdict, is_above: ClaimVerdict
) -> None:
    found = Interval(value=0.5, low=low, high=high, n=4, stderr=None)
    assert (below(found, 0.5), above(found, 0.5)) == (is_below, is_above)


def test_series_of_routers_are_averaged_over_the_same_layers(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "QUICK_LAYERS", 1)
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s", "pitfalls", "P4"))
    for name in ("sequential", "parallel", "static", "previous-token"):
        rows = run.rows.filter((pl.col("panel") == "recall") & (pl.col("series") == name))
        assert rows["x"].to_list() == [0]
        assert point(run, "means", name, label="corrected recall") == pytest.approx(rows["value"][0])
    errors = run.rows.filter(pl.col("panel") == "regret")
    assert set(errors["x"]) == {0}


def test_families_without_experts_are_served_where_a_method_serves_none() -> None:
    dense = sum(family.experts is None for family in FAMILIES.values())
    gated = sum(family.gate is not None for family in FAMILIES.values())
    assert speed.families_of("griffin@0.5") == len(FAMILIES) == 28
    assert speed.families_of("tda@0.5") == speed.families_of("dejavu@0.5") == dense == 24
    assert speed.families_of("chess@0.5") == gated < len(FAMILIES)


@pytest.mark.parametrize(("gains", "known"), [((1.0, -0.8), False), ((-1.0, -1.2), False), ((1.0, 1.2), True)])
def test_captured_is_unknown_where_the_oracle_gains_nothing_for_sure(gains: tuple[float, float], known: bool) -> None:
    def scored(nll: tuple[float, float]) -> Scored:
        return Scored(*(torch.tensor(nll, dtype=torch.float64)[:, None] for _ in FIELDS))

    parts = {donors.STATIC: scored((3.0, 3.0)), donors.ORACLE: scored((3.0 - gains[0], 3.0 - gains[1]))}
    found = donors.captured_gain(parts, scored((2.9, 2.9)), donors.STATIC, 0)
    assert found.value == (pytest.approx(0.2 / 2.2) if known else None)


def test_models_of_one_name_keep_apart_and_a_model_is_not_its_own_counterpart(
    long_corpus: Path, tmp_path: Path
) -> None:
    first, second = (save_tiny("llama", tmp_path / part / "model", seed=seed) for seed, part in enumerate(("v1", "v2")))
    one, two = (ModelSpec(name=str(folder), device="cpu") for folder in (first, second))
    alone = study(spec_of(second, long_corpus, tmp_path / "alone", "pitfalls", "P1"))
    pair = study(spec_of(first, long_corpus, tmp_path / "pair", "pitfalls", "P1", counterpart=two))
    labels = sorted(pair.rows["series"].unique())
    assert labels == sorted(f"{folder} (silu)" for folder in (first, second))
    mine = alone.rows.filter(pl.col("panel") == "sweep")["value"]
    theirs = pair.rows.filter((pl.col("panel") == "sweep") & (pl.col("series") == labels[1]))["value"]
    assert theirs.to_list() == pytest.approx(mine.to_list())
    copy = save_tiny("llama", tmp_path / "copy", seed=0)
    with pytest.raises(ModelError, match="is the model itself"):
        study(
            spec_of(first, long_corpus, tmp_path / "x", "pitfalls", "P1",
                    counterpart=replace(one, name=str(copy)))
        )  # fmt: skip


def test_routers_that_learned_too_little_leave_the_claim_open(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = Interval(value=0.1, low=0.05, high=0.2, n=4, stderr=0.03)
    high = Interval(value=0.8, low=0.7, high=0.9, n=4, stderr=0.03)
    assert routers.hard_to_predict(low, trained=True) is ClaimVerdict.HOLDS
    assert routers.hard_to_predict(low, trained=False) is ClaimVerdict.UNDECIDED
    assert routers.hard_to_predict(high, trained=False) is ClaimVerdict.FAILS
    quick = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "q", "pitfalls", "P4")).experiments[0]
    assert quick.high is not None
    assert quick.high < routers.HARD
    assert quick.verdict is ClaimVerdict.UNDECIDED
    assert "one epoch from at most 4,096 tokens; held-out recall was still rising in" in quick.conclusion
    monkeypatch.setattr(routers, "options", lambda _bench: "epochs=30,patience=1,rate=1e-9,tokens=64")
    spec = spec_of(tiny_folder("llama"), long_corpus, tmp_path / "f", "pitfalls", "P4", quick=False)
    done = study(spec).experiments[0]
    assert done.verdict is ClaimVerdict.HOLDS
    assert "until their held-out recall rose no more" in done.conclusion


def test_models_with_other_tokens_are_not_paired_block_by_block(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "relu", hidden_act="relu")
    make_tokenizer(bos=False).save_pretrained(folder)
    other = ModelSpec(name=str(folder), device="cpu")
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s", "pitfalls", "P1", "P5", counterpart=other))
    for found in run.experiments:
        assert found.verdict is ClaimVerdict.UNDECIDED
        assert "cuts the text differently" in found.conclusion
        assert found.notes


def test_a_timed_study_is_up_to_date_on_its_own_machine_only(
    tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: dict[str, set[Path]] = {}
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        for name in ("T2", "T4"):
            spec = replace(
                spec_of(tiny_folder("llama"), long_corpus, tmp_path, "tda", name), output=None, root=tmp_path
            )
            paths.setdefault(name, set()).add(study(spec).path)
    assert {name: len(found) for name, found in paths.items()} == {"T2": 2, "T4": 1}


def losses(*blocks: float) -> Scored:
    return Scored(*(torch.tensor(blocks, dtype=torch.float64)[:, None] for _ in FIELDS))


def test_a_mix_is_no_neuron_method_on_the_frontier() -> None:
    real = {"auto": losses(3.0, 3.1, 3.0), "teal": losses(3.2, 3.3, 3.2), "griffin": losses(4.0, 4.2, 4.0)}
    gap, verdict = frontier.channel_gap(real, 0)
    assert gap is not None
    assert gap.value == pytest.approx((0.8 + 0.9 + 0.8) / 3)
    assert verdict is ClaimVerdict.HOLDS
    assert frontier.channel_gap({"auto": real["auto"], "teal": real["teal"]}, 0) == (None, ClaimVerdict.UNDECIDED)


def test_layers_are_picked_on_other_blocks_than_they_are_compared_on() -> None:
    # noise alone: what was worst on the first half is not on the second
    scored = {0: losses(5.0, 5.0, 3.0, 3.1), 1: losses(4.0, 4.0, 4.0, 4.0), 2: losses(3.0, 3.0, 3.5, 3.2)}
    worst, best, spread = sensitivity.picked_apart(scored, 2, 0)
    assert (worst, best) == (0, 2)
    assert spread.value == pytest.approx(-0.3)
    assert above(spread, 0.0) is not ClaimVerdict.HOLDS
    assert sensitivity.picked_apart({0: losses(1.0), 1: losses(2.0)}, 0, 0)[2].low is None


def test_the_ceiling_of_a_latency_is_that_of_the_bytes_read(
    tiny_loaded: Callable, tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TDA's thresholds keep another share of this prompt than they were fitted to."""
    loaded, plans, timed = tiny_loaded("llama"), {}, speed.time_plan

    def spy(bench: bench_module.Bench, engines: Engines, plan: Plan, *, prompt: int, tokens: int) -> speed.Timed:
        plans[plan.name] = plan, prompt
        return timed(bench, engines, plan, prompt=prompt, tokens=tokens)

    monkeypatch.setattr(speed, "time_plan", spy)
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "t2", "tda", "T2"))
    plan, prompt = plans["tda@0.5"]
    ids = pool_of(loaded, long_corpus)[0, :prompt]
    with torch.no_grad():
        acts = neuron_inputs(loaded.model, lambda: loaded.model(input_ids=ids[None], use_cache=False))
    dropped = []
    for entry, a in zip(plan.fit.layers, acts, strict=True):
        rows = a[SINK:].double()
        s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
        dropped.append(float((s * FFN**0.5 < entry.threshold).double().mean()))
    step = loaded.record.step
    unread = sum(dropped) / LAYERS * step.mlp_total / step.total
    assert unread != pytest.approx(plan.predicted.model_bytes_frac, abs=1e-3)
    assert point(run, "speedup", "tda@0.5: ceiling", x=float(prompt)) == pytest.approx(1 / (1 - unread), rel=1e-9)


def test_the_frontier_is_drawn_at_the_bytes_that_were_not_read(
    tiny_loaded: Callable, tiny_folder: Callable, long_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TDA's thresholds keep another share of the scored prompts than they were fitted to."""
    loaded, plans, score = tiny_loaded("llama"), {}, bench_module.Bench.score

    def spy(bench: bench_module.Bench, short: str, *, prompt: int | None = None) -> Scored:
        if short.startswith("tda"):
            plans[short] = bench.plan(short)
        return score(bench, short, prompt=prompt)

    monkeypatch.setattr(bench_module.Bench, "score", spy)
    monkeypatch.setattr(frontier, "all_methods", lambda: {"tda": Tda})
    run = study(spec_of(tiny_folder("llama"), long_corpus, tmp_path / "s1", "frontier", "S1"))
    pool, step = pool_of(loaded, long_corpus), loaded.record.step
    realised = []
    for plan in plans.values():
        dropped = []
        for block in range(N):
            ids = pool[block, :PROMPT]
            with torch.no_grad():
                acts = neuron_inputs(loaded.model, lambda ids=ids: loaded.model(input_ids=ids[None], use_cache=False))
            for entry, a in zip(plan.fit.layers, acts, strict=True):
                rows = a[SINK:].double()
                s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
                dropped.append(float((s * FFN**0.5 < entry.threshold).double().mean()))
        realised.append(sum(dropped) / len(dropped) * step.mlp_total / step.total)
    rows = run.rows.filter(pl.col("panel") == "ppl")
    assert rows["x"].to_list() == pytest.approx(realised, rel=1e-9)
    predicted = [plan.predicted.model_bytes_frac for plan in plans.values()]
    assert rows["x"].to_list() != pytest.approx(predicted, abs=1e-4)
    off = [x for x, target in zip(realised, frontier.TARGETS, strict=False) if abs(x - target) > frontier.OFF]
    assert sum("leaves" in note for note in run.experiments[0].notes) == len(off)
