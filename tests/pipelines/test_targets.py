"""Calibration targets: what is asked for comes out, measured independently; what cannot be reached is named."""

import json
from math import exp
from pathlib import Path

import pytest
import torch
from tiny import FFN, LAYERS, token_ids, words
from transformers import AutoModelForCausalLM

from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import DataError, PlanError, RunError
from actsparse.methods.plan import Plan, from_record
from actsparse.pipelines.profile import profile
from actsparse.pipelines.threshold import threshold
from actsparse.results import Unit
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store import tensors
from actsparse.store.runs import PlanRun

PROMPT, BLOCK, SINK = 16, 40, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def profiled(folder: Path, tiny_folder) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text(words(400, seed=2))
    data = DataSpec(corpus=str(corpus), block_length=BLOCK, prompt_length=PROMPT, limit=6)
    spec = ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"), data=data, output=folder / "profile"
    )
    return profile(spec).path


@pytest.fixture(scope="module")
def blocks(tiny_loaded, folder: Path, profiled: Path):
    from actsparse.data.texts import TextReader

    data = DataSpec(corpus=str(folder / "corpus.txt"), block_length=BLOCK, prompt_length=PROMPT, limit=6)
    loaded = tiny_loaded("llama")
    return TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _text: None).calibration_blocks()


def made(profiled: Path, plan: str, output: Path, **asked) -> tuple[PlanRun, Plan]:
    run = threshold(ThresholdSpec(run=profiled, plan=plan, device="cpu", output=output, **asked))
    return run, from_record(run.plan, tensors.read(run.path / "plan.safetensors"), plan)


def local_errors(plan: Plan, loaded, blocks) -> list[float]:
    sums, count = [0.0] * LAYERS, 0
    for ids in blocks.ids:
        probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
        with probed(loaded.sites, [probe]), torch.no_grad():
            loaded.model(input_ids=ids[None])
        sums = [total + probe.tally(Unit.NEURON, layer).errors for layer, total in enumerate(sums)]
        count += BLOCK - PROMPT
    return [total / count for total in sums]


def rise(plan: Plan, loaded, blocks, prompt: int) -> float:
    """Relative rise of perplexity over tokens P..S-1, by a loop of its own."""
    losses = {"dense": 0.0, "sparse": 0.0}
    for ids in blocks.ids:
        for name in losses:
            run = MaskedPlan(plan.gates(), prompt_length=prompt if name == "sparse" else 10**6, sink_tokens=SINK)
            with masked(loaded.sites, run), torch.no_grad():
                logits = loaded.model(input_ids=ids[None]).logits[0].double()
            for t in range(prompt, len(ids)):
                losses[name] -= float(logits[t - 1].log_softmax(dim=0)[ids[t]])
    return exp((losses["sparse"] - losses["dense"]) / (len(blocks) * (len(blocks.ids[0]) - prompt))) - 1


@pytest.mark.parametrize("name", ["griffin", "cats", "cett", "static", "tda", "dejavu:epochs=1,rank=2"])
@pytest.mark.parametrize(("basis", "share"), [("model-bytes", 0.08), ("mlp-bytes", 0.2), ("neuron", 0.3)])
def test_a_share_on_a_basis_is_met(name, basis, share, profiled, tmp_path) -> None:
    run, plan = made(profiled, name, tmp_path / "run", sparsity=share, basis=basis)
    found = {
        "neuron": plan.predicted.neuron_frac,
        "mlp-bytes": plan.predicted.mlp_bytes_frac,
        "model-bytes": plan.predicted.model_bytes_frac,
    }[basis]
    assert found == pytest.approx(share, abs=0.5 / FFN + 1e-3)
    assert run.plan.target == f"{basis}={share:g}"
    assert run.plan.short.startswith(f"{name}@")


def test_a_speed_up_is_solved_through_the_bytes_that_are_not_read(profiled, tmp_path) -> None:
    run, plan = made(profiled, "griffin", tmp_path / "run", target_speedup=1.1)
    assert 1 / (1 - plan.predicted.model_bytes_frac) == pytest.approx(1.1, abs=0.01)
    assert run.plan.target == "speedup=1.1"


@pytest.mark.parametrize(("asked", "what"), [
    ({"target_speedup": 1.9}, r"cett cannot make this model 1.9x faster: .* at best 1\.\d+x"),
    ({"sparsity": 0.5, "basis": "mlp-bytes"}, r"cett cannot reach 50.0% on the basis mlp-bytes: 3\d\.\d% is the most"),
])  # fmt: skip
def test_what_cannot_be_reached_names_what_can(asked, what, profiled, tmp_path) -> None:
    with pytest.raises(PlanError, match=what) as caught:
        made(profiled, "cett", tmp_path / "run", **asked)
    hint = caught.value.hint.replace(",", "").split()
    nearest = {hint[2].replace("--", "").replace("-", "_"): float(hint[3])}
    if "sparsity" in nearest:
        nearest |= {"basis": "mlp-bytes"}
    made(profiled, "cett", tmp_path / "run", **nearest)


@pytest.mark.parametrize("name", ["griffin", "static", "cats", "coreinfer", "oracle-n", "moefication:neurons=2",
                                  "griffin:protect=0.1,compensate=true"])  # fmt: skip
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_an_error_target_is_met_in_every_layer(name, target, profiled, tmp_path, tiny_loaded, blocks) -> None:
    _, plan = made(profiled, name, tmp_path / "run", target_error=target)
    errors = local_errors(plan, tiny_loaded("llama"), blocks)
    assert all(error <= target + 1e-6 for error in errors)
    assert max(errors) > target - 0.15
    assert 0 < plan.predicted.neuron_frac < 1


def test_shares_differ_by_layer_under_an_error_target(profiled, tmp_path) -> None:
    _, plan = made(profiled, "griffin", tmp_path / "run", target_error=0.4)
    kept = [one.kept for one in plan.fit.layers]
    assert len(set(kept)) == LAYERS
    assert plan.target == "target_error=0.4"


@pytest.fixture(scope="module")
def trained(folder: Path):
    """A profile of a trained twin, its blocks, and the model: perplexity of a random model says nothing."""
    from actsparse.data.texts import TextReader
    from actsparse.models.load import load

    data = DataSpec(block_length=64, prompt_length=32, limit=2)
    path = profile(ProfileSpec(model=ModelSpec(name="demo", device="cpu"), data=data, output=folder / "trained")).path
    loaded = load(ModelSpec(name="demo", device="cpu"))
    reader = TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _text: None)
    return path, loaded, reader.calibration_blocks()


@pytest.mark.parametrize(("name", "increase"), [("griffin", 0.05), ("cett", 0.02)])
def test_a_rise_in_perplexity_is_met_from_below(name, increase, trained, tmp_path) -> None:
    path, loaded, blocks = trained
    run, plan = made(path, name, tmp_path / "run", target_ppl_increase=increase)
    found = rise(plan, loaded, blocks, 32)
    assert found <= increase * 1.01
    assert found > 0.5 * increase
    assert run.plan.target == f"ppl_increase={increase:g}"
    assert ("target_error=" in run.plan.short) == (name != "griffin")


@pytest.mark.parametrize(("asked", "what"), [
    ({"sparsity": 0.5, "target_error": 0.2}, "both --sparsity and --target-error"),
    ({"target_speedup": 1.2, "target_ppl_increase": 0.1}, "both --target-ppl-increase and --target-speedup"),
    ({"sparsity": 0.5, "basis": "bytes"}, "there is no basis 'bytes'"),
    ({"basis": "neuron", "target_error": 0.2}, "--basis says what --sparsity is a share of"),
    ({"target_speedup": 0.9}, "--target-speedup must be above 1, not 0.9"),
    ({"target_ppl_increase": 0.0}, "--target-ppl-increase must be above 0"),
])  # fmt: skip
def test_targets_that_do_not_fit_are_refused(asked, what, profiled, tmp_path) -> None:
    with pytest.raises(PlanError, match=what):
        made(profiled, "griffin", tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()


def test_a_target_beside_a_share_is_refused(profiled, tmp_path) -> None:
    with pytest.raises(PlanError, match="names a share already"):
        made(profiled, "griffin@0.5", tmp_path / "run", target_speedup=1.1)


def test_transfer_measures_the_plan_on_another_text(profiled, folder, tmp_path, tiny_loaded) -> None:
    other = tmp_path / "other.txt"
    other.write_text(words(300, seed=77))
    run, plan = made(profiled, "cats@0.5", tmp_path / "run", transfer=str(other))
    here, there = run.plan.measured
    assert (here.text.role, there.text.role, there.text.source) == ("calibration", "transfer", "other.txt")
    assert there.text.sha256 != here.text.sha256
    assert there.text.sequences == 6
    loaded, kept = tiny_loaded("llama"), [0.0] * LAYERS
    from actsparse.data.sequences import blocks_of

    text = blocks_of(other.read_text(), loaded.tokenizer, block_length=BLOCK, prompt_length=PROMPT, source="", role="")
    for ids in text.ids[:6]:
        probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
        with probed(loaded.sites, [probe]), torch.no_grad():
            loaded.model(input_ids=ids[None])
        kept = [a + b / 6 for a, b in zip(kept, probe.kept_frac(), strict=True)]
    assert [one.dropped for one in there.layers] == pytest.approx([1 - share for share in kept])
    assert there.realised.neuron_frac == pytest.approx(1 - sum(kept) / LAYERS)
    assert there.rel_err == pytest.approx(sum(one.rel_err for one in there.layers) / LAYERS)
    document = json.loads((run.path / "summary.json").read_text())
    assert document["measured"][1]["text"]["source"] == "other.txt"
    assert run.warnings == ()


def test_a_transfer_text_that_was_calibrated_on_is_warned_about(profiled, folder, tmp_path) -> None:
    run, _ = made(profiled, "griffin@0.5", tmp_path / "run", transfer=str(folder / "corpus.txt"))
    assert any("overlaps the calibration text" in text for text in run.warnings)
    with pytest.raises(PlanError, match="there is no file"):
        made(profiled, "griffin@0.5", tmp_path / "none", transfer="no-such.txt")
    short = tmp_path / "short.txt"
    short.write_text(words(10, seed=1))
    with pytest.raises(DataError, match="too few for one block"):
        made(profiled, "griffin@0.5", tmp_path / "short", transfer=str(short))


def test_what_was_not_realised_by_the_fit_is_measured(profiled, tmp_path) -> None:
    run, _ = made(profiled, "moefication:neurons=7@0.5", tmp_path / "run")
    (measured,) = run.plan.measured
    assert run.plan.realised == measured.realised
    assert 0.3 < measured.realised.neuron_frac <= 0.5


@pytest.mark.parametrize("plan", ["static@0.5", "static:stat=griffin,compensate=true@0.5", "random:seed=2@0.25"])
def test_an_export_computes_the_masked_path(plan, profiled, tmp_path, tiny_loaded) -> None:
    target = tmp_path / "smaller"
    _, fitted = made(profiled, plan, tmp_path / "run", export=target)
    small = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    loaded, ids = tiny_loaded("llama"), token_ids(2, 20, seed=9)
    with torch.no_grad():
        found = small(input_ids=ids).logits
        with masked(loaded.sites, MaskedPlan(fitted.gates(), prompt_length=0, sink_tokens=0)):
            naive = loaded.model(input_ids=ids).logits
    torch.testing.assert_close(found, naive, rtol=1e-4, atol=1e-4)
    assert small.config.intermediate_size == fitted.fit.layers[0].kept
    assert json.loads((target / "actsparse_plan.json").read_text())["short"] == plan
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in target.iterdir()} == {plain.stat().st_mode}, "the umask says who may read"
    with pytest.raises(RunError, match="holds an export already"):
        made(profiled, plan, tmp_path / "run", export=target)
    made(profiled, plan, tmp_path / "run", export=target, force=True)


@pytest.mark.parametrize("plan", ["griffin@0.5", "channels-static@0.5"])
def test_what_keeps_no_fixed_set_of_neurons_cannot_be_exported(plan, profiled, tmp_path) -> None:
    with pytest.raises(PlanError, match="has no mask over neurons"):
        made(profiled, plan, tmp_path / "run", export=tmp_path / "smaller")
    with pytest.raises(PlanError, match="neurons a layer, and a configuration has one width"):
        made(profiled, "static", tmp_path / "other", target_error=0.4, export=tmp_path / "smaller")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files that are not an export's"):
        made(profiled, "static@0.5", tmp_path / "third", export=tmp_path / "mine")
    assert not (tmp_path / "smaller").exists()


def test_a_plan_of_an_older_schema_is_refused_with_the_way_out(profiled, tmp_path) -> None:
    run, _ = made(profiled, "griffin@0.5", tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(RunError, match="has schema 1, this version of actsparse writes") as caught:
        PlanRun.open(run.path)
    assert "--force" in caught.value.hint


def test_an_interrupted_training_resumes(profiled, tmp_path, monkeypatch) -> None:
    from actsparse.methods import trained_method

    whole = made(profiled, "dejavu:epochs=2@0.5", tmp_path / "whole")[0]
    real, calls = trained_method.train, []

    def stops(*args, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(trained_method, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        made(profiled, "dejavu:epochs=2@0.5", tmp_path / "run")
    assert len(list((tmp_path / "run" / "shards").glob("*.safetensors"))) == 1
    counted: list[int] = []

    def counts(*args, **kwargs):
        counted.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(trained_method, "train", counts)
    run = made(profiled, "dejavu:epochs=2@0.5", tmp_path / "run")[0]
    assert len(counted) == LAYERS - 1
    assert not (run.path / "shards").exists()
    assert run.plan.layers == whole.plan.layers
    one, other = (tensors.read(path / "plan.safetensors") for path in (run.path, whole.path))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    layers = json.loads((run.path / "summary.json").read_text())["plan"]["layers"]
    assert all(0 < layer["recall"] <= 1 and layer["epoch"] is not None for layer in layers)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ({"plan": "griffin@0.3", "basis": "neuron"},
         "write the share apart: --method griffin --sparsity 0.3 --basis neuron"),
        ({"plan": "griffin", "basis": "neuron"}, "add --sparsity 0.25 --basis neuron"),
        ({"plan": "griffin", "basis": "neuron", "target_error": 0.2}, "leave out --basis: --target-error has none"),
    ],
)  # fmt: skip
def test_what_to_do_about_a_basis_alone_can_be_done(spec: dict, hint: str, profiled, tmp_path) -> None:
    with pytest.raises(PlanError) as refused:
        threshold(ThresholdSpec(run=profiled, device="cpu", output=tmp_path / "plan", **spec))
    assert refused.value.hint == hint
