"""Plans over neurons of mixtures of experts: each expert an FFN of its own, masked, counted and charged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXPERTS, FFN, SHARED, TOP_K, make_tokenizer, save_tiny, token_ids, words
from torch import Tensor
from transformers import DynamicCache

from actsparse.cli.app import main
from actsparse.core.masks import kept_count
from actsparse.data.sequences import Sequences, blocks_of
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import PlanError
from actsparse.methods.gates import Custom, FixedGate, LayerGates, TokenGate
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel, load
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.sparsify import sparsify
from actsparse.results import SHARED_EXPERT, Site, SiteKind, Unit, ffn_places
from actsparse.specs import ModelSpec
from actsparse.store.runs import EvalRun

PROMPT, BLOCK, SINK, PLACES = 14, 32, 4, EXPERTS + 2
SERVED = ("random", "static", "static:stat=griffin", "static:stat=coreinfer", "static:stat=griffin,source=n", "griffin",
          "coreinfer", "cats", "chess", "countdown", "oracle-a",
          "oracle-n", "oracle-gate", "oracle-up")  # fmt: skip
REFUSED = ("tda:target_error=0.2", "cett:target=0.2", "dejavu@0.5", "moefication@0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a shared expert in layer 0 and a dense layer 1."""
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("moe") / "model", mlp_only_layers=[1])


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSpec(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def blocks() -> Sequences:
    return blocks_of(
        words(500, seed=3), make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="calibration"
    )


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel, blocks: Sequences) -> TextCalibration:
    return of_blocks(loaded, blocks, PROMPT, Silent())


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]


def logits_of(loaded: LoadedModel, gates: list[LayerGates], ids: Tensor, *, steps: bool = False) -> tuple[Any, Tensor]:
    model: Any = loaded.model
    run = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)
    with masked(loaded.sites, run, errors=True), torch.no_grad():
        if not steps:
            return run, model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=ids[:, :PROMPT], past_key_values=cache).logits]
        parts += [model(input_ids=one, past_key_values=cache).logits for one in ids[:, PROMPT:].split(1, dim=1)]
        return run, torch.cat(parts, dim=1)


def shown(loaded: LoadedModel, ids: Tensor, kind: SiteKind) -> dict[int, tuple[Tensor, Tensor]]:
    """By place: activations [seq, width] of one sequence, and which tokens pass."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def see(site: Site, x: Tensor) -> None:
        routed = torch.ones(x.shape[1], dtype=torch.bool) if tap.routed is None else tap.routed[0]
        found[loaded.sites.ffn_index[site.layer, site.expert]] = (x[0].clone(), routed.clone())

    with tapped(loaded.sites, {kind: see}) as tap, torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    return found


def test_places_say_what_a_token_reads(loaded: LoadedModel) -> None:
    places = loaded.record.ffns
    assert [(one.layer, one.expert, one.width) for one in places] == [
        *((0, expert, FFN) for expert in range(EXPERTS)), (0, SHARED_EXPERT, SHARED), (1, None, FFN)
    ]  # fmt: skip
    read = TOP_K * FFN + SHARED
    assert [one.share for one in places] == pytest.approx(
        [*[TOP_K * FFN / EXPERTS / read] * EXPERTS, SHARED / read, 1.0]
    )
    assert ffn_places(3, 7, None)[2].layer == 2


@pytest.mark.parametrize("name", SERVED)
def test_a_share_is_dropped_of_every_expert(name: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    ids = token_ids(2, BLOCK, seed=1)
    with torch.no_grad():
        dense = loaded.model(input_ids=ids, use_cache=False).logits
    everything = fitted(f"{name}@0", loaded, calibration)
    run, logits = logits_of(loaded, everything.gates(), ids)
    assert torch.equal(logits, dense)
    assert set(run.kept_frac()) == {1.0}
    plan = fitted(f"{name}@0.5", loaded, calibration)
    assert [one.width for one in plan.fit.layers] == [FFN] * EXPERTS + [SHARED, FFN]
    assert plan.predicted.neuron_frac == pytest.approx(0.5, abs=0.02)
    run, logits = logits_of(loaded, plan.gates(), ids)
    assert not torch.equal(logits, dense)
    assert torch.equal(logits[:, : PROMPT - 1], dense[:, : PROMPT - 1])
    tallies = run.by_layer(loaded.sites)
    assert set(tallies) == {(Unit.NEURON, 0), (Unit.NEURON, 1)}
    sparse = 2 * (BLOCK - PROMPT)
    assert tallies[Unit.NEURON, 1].positions == sparse
    assert tallies[Unit.NEURON, 0].positions == sparse * (TOP_K + 1)
    for tally in tallies.values():
        assert tally.kept_frac == pytest.approx(0.5, abs=0.15)
        assert 0 < tally.mean_error < 2


def test_an_oracle_takes_the_top_of_each_expert(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan, ids = fitted("oracle-n@0.75", loaded, calibration), token_ids(1, BLOCK, seed=2)
    probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
    with probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    for place, (a, routed) in shown(loaded, ids, SiteKind.NEURON).items():
        ffn = loaded.sites.ffns[place]
        down, errors = ffn.down_matrix(), []
        kept = kept_count(0.25, ffn.width)
        for row in a[PROMPT:][routed[PROMPT:]]:
            scores = row.abs() * down.norm(dim=0)
            small = torch.ones(ffn.width, dtype=torch.bool)
            small[scores.argsort(descending=True)[:kept]] = False
            errors.append(float((down @ (row * small)).norm() / (down @ row).norm()))
        tally = probe.tally(Unit.NEURON, place)
        assert tally.positions == len(errors)
        assert tally.kept_frac == pytest.approx(kept / ffn.width)
        assert tally.mean_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_griffin_chooses_from_the_prompt_tokens_of_each_expert(
    loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan, ids = fitted("griffin@0.5", loaded, calibration), token_ids(1, BLOCK, seed=4)
    run, _ = logits_of(loaded, plan.gates(), ids)
    prompt = shown(loaded, ids, SiteKind.NEURON)
    for place, state in enumerate(run.state.neurons):
        a, routed = prompt[place]
        rows = a[SINK:PROMPT][routed[SINK:PROMPT]]
        if not len(rows):
            assert state.chosen().all()
            continue
        statistic = (rows / rows.norm(dim=1, keepdim=True)).square().sum(dim=0).sqrt()
        kept = kept_count(0.5, rows.shape[1])
        expected = torch.zeros(rows.shape[1], dtype=torch.bool)
        expected[statistic.argsort(descending=True)[:kept]] = True
        assert torch.equal(state.chosen()[0], expected)


def test_an_expert_that_the_prompt_never_used_keeps_everything(loaded: LoadedModel) -> None:
    from actsparse.methods.gates import PrefillGate
    from actsparse.methods.prompt_statistic import PromptStatistic

    ids = token_ids(1, 12, seed=5)
    gate = PrefillGate(PromptStatistic, lambda s: s > s.median())
    run = MaskedPlan([LayerGates(neurons=gate)] * PLACES, prompt_length=5, sink_tokens=SINK)
    with masked(loaded.sites, run), torch.no_grad():
        loaded.model(input_ids=ids, use_cache=False)
    # one prompt token after the sink tokens passes through three of five experts
    seen = [state is not None and state.ready for state in run.state.neurons]
    assert sum(seen[:EXPERTS]) == TOP_K
    for place in range(EXPERTS):
        tally = run.tally(Unit.NEURON, place)
        if not seen[place] and tally.positions:
            assert tally.kept_frac == 1.0


@pytest.mark.parametrize("name", ["griffin", "static", "oracle-a", "random"])
def test_token_by_token_and_batches_agree(name: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    gates, ids = fitted(f"{name}@0.5", loaded, calibration).gates(), token_ids(2, BLOCK, seed=6)
    _, whole = logits_of(loaded, gates, ids)
    _, steps = logits_of(loaded, gates, ids, steps=True)
    torch.testing.assert_close(steps, whole, atol=1e-3, rtol=1e-3)
    for index in range(2):
        _, alone = logits_of(loaded, gates, ids[index : index + 1])
        torch.testing.assert_close(whole[index : index + 1], alone, atol=1e-3, rtol=1e-3)


def test_bytes_are_those_that_a_token_reads(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan, step = fitted("static@0.5", loaded, calibration), loaded.record.step
    assert plan.predicted.mlp_bytes_frac == pytest.approx(0.5, abs=1e-6)
    assert plan.predicted.model_bytes_frac == pytest.approx(0.5 * step.mlp_total / step.total, rel=1e-4)
    cats = fitted("cats@0.5", loaded, calibration)
    assert cats.predicted.mlp_bytes_frac == pytest.approx(0.5 * 2 / 3, rel=1e-4)


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_carry_over_is_refused(text: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    with pytest.raises(PlanError, match="does not serve mixtures of experts") as caught:
        fitted(text, loaded, calibration)
    assert "griffin" in caught.value.hint


def test_generation_runs_sparse(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    ids = token_ids(2, PROMPT, seed=7)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    dense = model.generate(ids, **settings)
    with sparsify(model, "griffin@0"):
        assert torch.equal(model.generate(ids, **settings), dense)
    with sparsify(model, "griffin@0.9"):
        sparse = model.generate(ids, **settings)
    # the first generated token comes from the dense prompt
    assert torch.equal(sparse[:, : PROMPT + 1], dense[:, : PROMPT + 1])
    assert not torch.equal(sparse, dense)
    assert torch.equal(model.generate(ids, **settings), dense)


def test_profile_threshold_evaluate_from_the_command_line(
    folder: Path, corpus_file: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run, plan, out = (str(tmp_path / name) for name in ("profile", "plan", "eval"))
    assert main(["profile", "-m", str(folder), "--prompts", str(prompts_file), "-o", run, "-q"]) == 0
    assert main(["threshold", run, "--method", "cats", "--sparsity", "0.5", "-o", plan, "-q"]) == 0
    assert main(["threshold", run, "--method", "tda", "--sparsity", "0.5", "-o", str(tmp_path / "no"), "-q"]) == 1
    line = ["evaluate", "-m", str(folder), "--corpus", str(corpus_file), "-n", "2", "--block-length", "32",
            "--prompt-length", "14", "--plan", plan, "--plan", "griffin@0.5", "--timing-pairs", "0",
            "--generations", "1", "--max-new-tokens", "3", "-o", out, "-q"]  # fmt: skip
    assert main(line) == 0
    rows = EvalRun.open(Path(out)).results
    for name in (plan, "griffin@0.5"):
        shares = rows.filter(plan=name, metric="neuron_frac", param="basis=realised")["value"]
        assert shares.item() == pytest.approx(0.5, abs=0.2)
        assert rows.filter(plan=name, metric="kept_frac").height == 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe"])
def test_an_all_keep_gate_is_dense_bit_for_bit(family: str, tiny_loaded: Callable) -> None:
    one = tiny_loaded(family)
    ids = token_ids(2, BLOCK, seed=8)
    with torch.no_grad():
        dense = one.model(input_ids=ids, use_cache=False).logits
    for make in (
        lambda width: FixedGate(torch.ones(width, dtype=torch.bool)),
        lambda _width: TokenGate(SiteKind.GATE, Custom(lambda x: x.abs() >= 0.0)),
    ):
        gates = [LayerGates(neurons=make(ffn.width)) for ffn in one.sites.ffns]
        run, logits = logits_of(one, gates, ids)
        assert torch.equal(logits, dense)
        assert set(run.kept_frac()) == {1.0}
