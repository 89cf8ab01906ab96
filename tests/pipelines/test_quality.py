"""Quality numbers against a loop that shares no code with the pipeline, and evaluations that were interrupted."""

import copy
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path

import polars as pl
import pytest
import torch
from listening import Listener
from tiny import FFN, LAYERS
from torch import Tensor
from transformers import DynamicCache

from actsparse.data.texts import TextReader
from actsparse.engine.own import OwnRun
from actsparse.models.families import FAMILIES
from actsparse.models.load import LoadedModel
from actsparse.pipelines import eval_tables, quality
from actsparse.pipelines.evaluate import evaluate
from actsparse.specs import DataSpec, EvalSpec, ModelSpec
from actsparse.store.runs import EvalRun

BLOCK, PROMPT, SINK, N = 40, 16, 4, 3


def spec_of(folder: Path, corpus: Path, output: Path, *plans: str, **options: object) -> EvalSpec:
    data = DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT)
    settings = {"timing_pairs": 0, "generations": 1, "max_new_tokens": 4, "controls": False} | options
    return EvalSpec(model=ModelSpec(name=str(folder), device="cpu"), data=data, plans=plans, output=output, **settings)


def blocks_of_eval(loaded: LoadedModel, corpus: Path) -> Tensor:
    data = DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=PROMPT)
    return TextReader(data, loaded.tokenizer, None, lambda _line: None).eval_texts().quality.stack()


def neuron_inputs(model: torch.nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """a [seq, neurons] of every layer in one pass, by hooks of the test's own."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: found.append(args[0][0].clone()))
        for layer in model.model.layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def naive_block(loaded: LoadedModel, block: Tensor, masks: list[Tensor] | None) -> dict[str, Tensor | list[float]]:
    """One block in the decode regime; `masks` None: GRIFFIN's own at density 0.5."""
    model = loaded.model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        acts = neuron_inputs(model, lambda: model(input_ids=block[None], use_cache=False))
        dense = model(input_ids=block[None], use_cache=False).logits[0].log_softmax(-1)
        if masks is None:
            masks = []
            for a in acts:
                rows = a[SINK:PROMPT].double()
                s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
                masks.append(torch.zeros(FFN, dtype=torch.bool).index_fill_(0, s.topk(FFN // 2).indices, True))
        pruned = copy.deepcopy(model)
        for layer, mask in zip(pruned.model.layers, masks, strict=True):
            layer.mlp.down_proj.weight.data[:, ~mask] = 0
        first = model(input_ids=block[None, :PROMPT], past_key_values=cache, use_cache=True).logits[0, -1:]
        rest: list[Tensor] = []
        positions = torch.arange(PROMPT, BLOCK - 1)[None]
        sparse_acts = neuron_inputs(
            pruned,
            lambda: rest.append(
                pruned(
                    input_ids=block[None, PROMPT:-1], position_ids=positions, past_key_values=cache, use_cache=True
                ).logits[0]
            ),
        )
        sparse = torch.cat([first, rest[0]]).log_softmax(-1)
    reference, targets = dense[PROMPT - 1 : BLOCK - 1], block[PROMPT:]

    def error(rows: Tensor, layer: int) -> float:
        down = model.model.layers[layer].mlp.down_proj.weight.detach()
        return float(((rows * ~masks[layer]) @ down.T).norm(dim=1).div((rows @ down.T).norm(dim=1)).mean())

    return {
        "nll": -sparse.gather(1, targets[:, None])[:, 0].double(),
        "dense_nll": -reference.gather(1, targets[:, None])[:, 0].double(),
        "kl": (reference.exp() * (reference - sparse)).sum(1).double(),
        "top1": (reference.argmax(1) == sparse.argmax(1)).double(),
        "kept_frac": [float(mask.float().mean()) for mask in masks],
        "rel_err": [error(a[PROMPT : BLOCK - 1], i) for i, a in enumerate(acts)],
        "rel_err_path": [error(a, i) for i, a in enumerate(sparse_acts)],
    }


def value(run: EvalRun, plan: str, metric: str, param: str = "") -> float:
    rows = run.results.filter((pl.col("plan") == plan) & (pl.col("metric") == metric) & (pl.col("param") == param))
    assert rows.height == 1
    return rows["value"][0]


def test_numbers_equal_a_naive_loop(tiny_loaded: Callable, tiny_folder: Callable, corpus_file: Path,
                                    tmp_path: Path) -> None:  # fmt: skip
    loaded = tiny_loaded("llama")
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5", "random:seed=1@0.25"))
    ids = blocks_of_eval(loaded, corpus_file)
    assert ids[:, 0].tolist() == [1] * N
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(FFN, generator=generator)[:36] for _ in range(LAYERS)]
    random_masks = [torch.zeros(FFN, dtype=torch.bool).index_fill_(0, chosen, True) for chosen in drawn]
    for plan, masks in (("griffin@0.5", None), ("random:seed=1@0.25", random_masks)):
        naive = [naive_block(loaded, block, masks) for block in ids]
        nll = torch.cat([one["nll"] for one in naive])
        dense = torch.cat([one["dense_nll"] for one in naive])
        assert len(nll) == N * (BLOCK - PROMPT)
        assert value(run, "dense", "ppl") == pytest.approx(exp(float(dense.mean())), rel=1e-5)
        assert value(run, plan, "ppl") == pytest.approx(exp(float(nll.mean())), rel=1e-4)
        assert value(run, plan, "kl") == pytest.approx(float(torch.cat([one["kl"] for one in naive]).mean()), rel=1e-3)
        assert value(run, plan, "top1") == pytest.approx(float(torch.cat([one["top1"] for one in naive]).mean()))
        difference = float((nll - dense).mean())
        assert value(run, plan, "delta_nll", "reference=dense") == pytest.approx(difference, abs=1e-4)
        for layer in range(LAYERS):
            for metric in ("kept_frac", "rel_err", "rel_err_path"):
                expected = sum(one[metric][layer] for one in naive) / N
                assert value(run, plan, metric, f"layer={layer}") == pytest.approx(expected, rel=1e-3), metric
        dropped = 1 - sum(naive[0]["kept_frac"]) / LAYERS
        assert value(run, plan, "neuron_frac", "basis=realised") == pytest.approx(dropped)
    tokens = run.tokens.filter(pl.col("plan") == "dense").sort("block", "position")
    assert tokens["position"].unique().sort().to_list() == list(range(PROMPT, BLOCK))
    assert tokens["token"].to_list() == ids[:, PROMPT:].flatten().tolist()


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3", "mpt"])
def test_other_families_evaluate_with_engine_and_masks_agreeing(
    family: str, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    spec = spec_of(tiny_folder(family), corpus_file, tmp_path / "e", "griffin@0.5", "cats@0.5", timing_pairs=2,
                   timing_tokens=3)  # fmt: skip
    run = evaluate(spec)
    found = {plan["plan"]: plan for plan in run.summary["plans"]}
    assert value(run, "griffin@0.5", "path_check") < 1e-3
    assert found["griffin@0.5"]["speed"]["speedup"]["value"] > 0
    if FAMILIES[family].tier == 1:
        assert value(run, "cats@0.5", "path_check") < 1e-3
        assert found["cats@0.5"]["speed"]["speedup"]["value"] > 0
        assert found["cats@0.5"]["sparsity"]["useful"]["mlp_bytes_frac"] > 0
    else:
        assert found["cats@0.5"]["speed"] is None
        assert "no engine" in found["cats@0.5"]["speed_reason"]
    assert found["cats@0.5"]["quality"]["kl"]["value"] > 0
    assert found["griffin@0.5"]["sparsity"]["realised"]["mlp_bytes_frac"] == pytest.approx(0.5, abs=0.01)


def test_controls_stand_beside_a_method_and_random_is_three_seeds(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5", controls=True))
    plans = {plan["plan"]: plan for plan in run.summary["plans"]}
    assert set(plans) == {"griffin@0.5", "static:stat=griffin@0.5", "static@0.5", "random@0.5"}
    assert plans["random@0.5"]["replicas"] == 3
    rows = run.tokens.filter(pl.col("plan") == "random@0.5")
    assert rows["replica"].unique().sort().to_list() == [0, 1, 2]
    assert value(run, "random@0.5", "ppl") == pytest.approx(exp(rows["nll"].mean()), rel=1e-9)
    assert plans["random@0.5"]["speed"] is None
    assert plans["random@0.5"]["speed_reason"]


def test_controls_of_a_share_of_bytes_drop_as_many_neurons_as_the_plan_did(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    name = "auto:methods=cats@0.1"
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", name, controls=True))
    found = {plan["plan"]: plan["sparsity"]["realised"]["neuron_frac"] for plan in run.summary["plans"]}
    dropped = found.pop(name)
    assert dropped > 0.15
    assert len(found) == 3
    for control in found.values():
        # a control keeps whole neurons
        assert control == pytest.approx(dropped, abs=0.5 / FFN + 0.001)


def test_an_interrupted_evaluation_loses_no_more_than_the_pass_at_work(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plans = tiny_folder("llama"), ("griffin@0.5", "cats@0.5", "static@0.5")
    whole = evaluate(spec_of(folder, corpus_file, tmp_path / "whole", *plans))
    spec = spec_of(folder, corpus_file, tmp_path / "cut", *plans)
    # four passes a block, and one step more at the start of each for what was finished before
    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, Listener("scoring", 1 + 4 + 1 + 3))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    scored: list[tuple[int, str]] = []
    original = quality._Scorer._score_plan

    def score(scorer: quality._Scorer, run: quality.Scoring, block: Tensor, index: int, *rest: object) -> None:
        scored.append((index, run.name))
        original(scorer, run, block, index, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(quality._Scorer, "_score_plan", score)
    again = evaluate(spec)
    assert scored == [(1, "static@0.5"), *((2, name) for name in plans)]
    assert again.tokens.equals(whole.tokens)
    assert again.results.equals(whole.results)
    assert again.generations == whole.generations


def test_a_sweep_is_as_many_plans(tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> None:
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.2:0.8:0.3", "griffin@0.5"))
    assert [plan["plan"] for plan in run.summary["plans"]] == ["griffin@0.2", "griffin@0.5", "griffin@0.8"]
    dropped = [value(run, f"griffin@{share}", "neuron_frac", "basis=realised") for share in (0.2, 0.5, 0.8)]
    assert dropped == pytest.approx([0.2, 0.5, 0.8], abs=0.01)


def test_the_seed_draws_the_bootstrap_and_nothing_that_was_measured(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    specs = [spec_of(tiny_folder("llama"), corpus_file, tmp_path / str(seed), "griffin@0.5") for seed in (0, 7)]
    runs = [evaluate(replace(spec, data=replace(spec.data, seed=7 * i))) for i, spec in enumerate(specs)]
    assert runs[0].tokens.equals(runs[1].tokens)
    rows = [run.results.filter(plan="griffin@0.5", metric="nll").row(0, named=True) for run in runs]
    assert rows[0]["value"] == rows[1]["value"]
    assert rows[0]["stderr"] != rows[1]["stderr"]


def test_free_running_samples_follow_the_dense_text_as_far_as_they_say(
    tiny_folder: Callable, tiny_loaded: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    loaded = tiny_loaded("llama")
    plans = ("griffin@0", "griffin@0.6")
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", *plans, generations=3, max_new_tokens=8))
    dense = {one.prompt: one for one in run.generations if one.plan == "dense"}
    assert value(run, "griffin@0", "exact_match_tokens") == sum(one.tokens for one in dense.values()) / 3
    assert value(run, "griffin@0", "diverged_frac") == 0
    assert value(run, "griffin@0", "dense_text_kl") == pytest.approx(0, abs=1e-5)
    sparse = [one for one in run.generations if one.plan == "griffin@0.6"]
    leads = []
    for one in sparse:
        reference = dense[one.prompt].token_ids
        differ = [i for i, (a, b) in enumerate(zip(reference, one.token_ids, strict=False)) if a != b]
        leads.append(differ[0] if differ else len(reference))
    assert value(run, "griffin@0.6", "exact_match_tokens") == pytest.approx(sum(leads) / 3)
    ids = blocks_of_eval(loaded, corpus_file)[0, :PROMPT]
    text = torch.cat([ids, torch.tensor(dense[0].token_ids)])
    naive = naive_block_kl(loaded, text)
    assert next(one for one in sparse if one.prompt == 0).dense_kl == pytest.approx(naive, rel=1e-3)


def naive_block_kl(loaded: LoadedModel, text: Tensor) -> float:
    """Mean KL along the tokens after the prompt under GRIFFIN at density 0.4."""
    model = loaded.model
    with torch.no_grad():
        acts = neuron_inputs(model, lambda: model(input_ids=text[None, :PROMPT], use_cache=False))
        dense = model(input_ids=text[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        masks = []
        for a in acts:
            rows = a[SINK:PROMPT].double()
            s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
            masks.append(torch.zeros(FFN, dtype=torch.bool).index_fill_(0, s.topk(round(0.4 * FFN)).indices, True))
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _m, args, kept=mask: (
                    torch.cat([args[0][:, :PROMPT], torch.where(kept, args[0][:, PROMPT:], 0.0)], dim=1),
                )
            )
            for layer, mask in zip(model.model.layers, masks, strict=True)
        ]
        sparse = model(input_ids=text[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
    return float((dense.exp() * (dense - sparse))[PROMPT - 1 :].sum(-1).mean())


def test_evaluate_twice_is_up_to_date(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5")
    first = evaluate(spec)
    monkeypatch.setattr(quality, "scored_logits", lambda *_: pytest.fail("scored again"))
    assert evaluate(spec).manifest == first.manifest


def test_an_engine_that_gives_nan_is_said_and_recorded(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OwnRun.forced

    def broken(self: OwnRun, tokens: Tensor) -> Tensor:
        logits = whole(self, tokens).clone()
        logits[:, 2] = float("nan")
        return logits

    monkeypatch.setattr(OwnRun, "forced", broken)
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5"))
    assert value(run, "griffin@0.5", "path_lost") == 1
    assert value(run, "griffin@0.5", "path_check") < 1e-3, "over the other tokens"
    assert any("no finite likelihood on 1 of the checked tokens" in text for text in run.summary["warnings"])


def test_errors_of_layers_are_over_blocks_and_not_over_seeds() -> None:
    errors = {0: (0.1, 0.3), 1: (0.2, 0.4), 2: (0.6, 0.8)}  # of two seeds a block
    kept = pl.DataFrame(
        [
            {"layer": 0, "unit": "neuron", "block": block, "replica": seed, "positions": 8, "kept_frac": 0.5,
             "rel_err": found, "rel_err_path": found}
            for block, both in errors.items() for seed, found in enumerate(both)
        ]
    )  # fmt: skip
    rows = {row.metric: row for row in eval_tables._layer_rows("p", kept)}
    blocks = torch.tensor([0.2, 0.3, 0.7], dtype=torch.float64)
    assert rows["rel_err"].value == pytest.approx(0.4)
    assert rows["rel_err"].stderr == pytest.approx(float(blocks.std()) / 3**0.5)
    assert (rows["kept_frac"].stderr, rows["kept_frac"].n) == (0.0, 48)
    alone = eval_tables._layer_rows("p", kept.filter(pl.col("block") == 0))
    assert [row.stderr for row in alone] == [None] * 3


def test_agreement_has_intervals_over_blocks(tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> None:
    run = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5", "random@0.5"))
    layers = run.results.filter(plan="griffin@0.5", metric="rel_err")
    assert layers["stderr"].min() > 0  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    for plan in ("griffin@0.5", "random@0.5"):
        for metric in ("kl", "top1"):
            low, middle, high = (value(run, plan, metric + end) for end in ("_low", "", "_high"))
            means = run.tokens.filter(pl.col("plan") == plan).group_by("block").agg(pl.col(metric).cast(float).mean())
            assert means[metric].min() <= low < middle < high <= means[metric].max()
    found = {plan["plan"]: plan["quality"] for plan in run.summary["plans"]}
    assert found["griffin@0.5"]["kl_low"]["value"] < found["griffin@0.5"]["kl"]["value"]
