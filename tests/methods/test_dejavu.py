"""Deja Vu: labels of the definition, learning, its three inputs, resuming, router files, and what goes wrong."""

from pathlib import Path

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from tiny import FFN, HIDDEN, LAYERS, token_ids
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import PlanError
from actsparse.methods.dejavu import used_neurons
from actsparse.methods.gates import FixedGate, Router, TokenGate
from actsparse.methods.plan import Plan, check_layers, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import unit_widths
from actsparse.models.taps import tapped
from actsparse.pipelines import training
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.plans import identity_of
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.training import sample_positions
from actsparse.results import Site, SiteKind
from actsparse.store import tensors

QUICK = "epochs=40,batch=16,rate=0.01"


class Folder:
    """Checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=loaded.record.gated)[0]


def test_labels_of_a_smooth_model_are_its_top_by_output_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    a, norms = torch.randn(20, 9, generator=generator), torch.rand(9, generator=generator)
    for row, label in zip(a.tolist(), used_neurons(a, norms, 4), strict=True):
        ranked = sorted(range(9), key=lambda i: -abs(row[i]) * float(norms[i]))
        assert sorted(ranked[:4]) == label.nonzero().squeeze(1).tolist()


def test_labels_of_a_relu_model_are_what_is_not_zero() -> None:
    a = torch.tensor([[0.0, 1.0, 0.0], [-2.0, 0.0, 3.0]])
    assert used_neurons(a, None, 1).tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize("inputs", ["sequential", "parallel", "lookahead"])
def test_a_router_learns_what_its_layer_uses(inputs: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted(f"dejavu:{QUICK},input={inputs}@0.5", loaded, calibration)
    untrained = fitted(f"dejavu:epochs=1,rate=1e-12,input={inputs}@0.5", loaded, calibration)
    for layer in range(LAYERS):
        learnt, drawn = plan.fit.layers[layer], untrained.fit.layers[layer]
        assert learnt.recall is not None
        assert drawn.recall is not None
        assert learnt.recall_corrected == pytest.approx((learnt.recall - 0.5) / 0.5)
        assert learnt.recall > drawn.recall + 0.05
        assert abs(drawn.recall - 0.5) < 0.15


@pytest.mark.parametrize(("inputs", "kind", "ahead"), [
    ("sequential", SiteKind.MLP_IN, 0), ("parallel", SiteKind.ATTN_IN, 0), ("lookahead", SiteKind.ATTN_IN, 1),
])  # fmt: skip
def test_masks_are_the_top_logits_of_the_input_that_was_asked_for(
    inputs: str, kind: SiteKind, ahead: int, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"dejavu:epochs=1,input={inputs}@0.75", loaded, calibration)
    ids, seen, kept = token_ids(1, BLOCK, seed=8), {}, {}
    with torch.no_grad():
        with tapped(loaded.sites, {kind: lambda site, x: seen.update({site.layer: x[0]})}):
            loaded.model(input_ids=ids)
        run = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
        with (
            masked(loaded.sites, run),
            tapped(loaded.sites, {SiteKind.NEURON: lambda s, a: kept.update({s.layer: a[0]})}),
        ):
            loaded.model(input_ids=ids)
    for layer, gate in enumerate(plan.gates()):
        assert isinstance(gate.neurons, TokenGate)
        assert isinstance(gate.neurons.rule, Router)
        assert (gate.neurons.site, gate.neurons.ahead) == (kind, ahead)
        first, second = (plan.fit.tensors[f"layers.{layer}.router.{part}"] for part in ("first", "second"))
        source = seen[max(0, layer - ahead)][PROMPT]
        logits = (second @ (first @ source)).tolist()
        naive = sorted(sorted(range(FFN), key=lambda i: -logits[i])[: FFN // 4])
        assert gate.neurons.rule.keep(source[None])[0].nonzero().squeeze(1).tolist() == naive
        if layer == 0:
            assert kept[0][PROMPT].nonzero().squeeze(1).tolist() == naive


def test_pairs_are_the_models_own_inputs_and_activations(loaded: LoadedModel, blocks: Sequences, calibration) -> None:
    seen: dict[tuple[SiteKind, int], list[Tensor]] = {}

    def note(site: Site, x: Tensor) -> None:
        seen.setdefault((site.kind, site.layer), []).append(x[0])

    with tapped(loaded.sites, {SiteKind.ATTN_IN: note, SiteKind.NEURON: note}), torch.no_grad():
        for block in blocks.stack():
            loaded.model(input_ids=block[None])
    places = sample_positions(blocks, 50, seed=3)
    pairs = list(calibration.training().pairs(SiteKind.ATTN_IN, [0, 1], ahead=1, tokens=50, seed=3))
    assert [one.layer for one in pairs] == [0, 1]
    for one in pairs:
        x, a = torch.cat([one.x, one.held_x]), torch.cat([one.a, one.held_a])
        assert len(x) == 50
        assert len(one.held_x) == 10
        for index, (block, place) in enumerate(zip(places.block.tolist(), places.place.tolist(), strict=True)):
            assert torch.equal(x[index], seen[SiteKind.ATTN_IN, 0][block][place])
            assert torch.equal(a[index], seen[SiteKind.NEURON, one.layer][block][place])


def test_sampled_positions_leave_sink_tokens_out_and_judge_on_the_end(blocks: Sequences) -> None:
    places = sample_positions(blocks, 10**6, seed=0)
    assert len(places) == len(blocks) * (BLOCK - SINK)
    assert int(places.place.min()) == SINK
    ranks = places.block * BLOCK + places.place
    assert int(ranks[: places.training].max()) < int(ranks[places.training :].min())
    assert len(places) - places.training == round(0.2 * len(places))
    one, again, other = (sample_positions(blocks, 40, seed) for seed in (1, 1, 2))
    assert torch.equal(one.place, again.place)
    assert not torch.equal(one.place, other.place)


def test_a_small_budget_of_memory_takes_more_passes_and_finds_the_same(
    loaded: LoadedModel, calibration: TextCalibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(calibration.training().pairs(SiteKind.MLP_IN, [0, 1], ahead=0, tokens=30, seed=1))
    passes: list[tuple[int, ...]] = []
    real = training.tapped
    monkeypatch.setattr(training, "tapped", lambda s, c, layers: passes.append(layers) or real(s, c, layers))
    monkeypatch.setattr(training, "SAMPLE_BYTES", 30 * (HIDDEN + FFN) * 4)
    parts = list(calibration.training().pairs(SiteKind.MLP_IN, [0, 1], ahead=0, tokens=30, seed=1))
    assert passes == [(0,), (1,)]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.held_a, other.held_a)


def test_layers_without_a_router_stay_dense(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("dejavu:epochs=1,layers=1@0.5", loaded, calibration)
    first, second = (gate.neurons for gate in plan.gates())
    assert isinstance(first, FixedGate)
    assert bool(first.mask.all())
    assert isinstance(second, TokenGate)
    assert plan.predicted.neuron_frac == pytest.approx(0.25)
    router = HIDDEN * HIDDEN + FFN * HIDDEN
    assert [gate.mlp_extra_bytes for gate in plan.gates()] == [0, 4 * router]


def test_the_rank_bounds_what_a_router_reads(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("dejavu:epochs=1,rank=3@0.5", loaded, calibration)
    assert plan.fit.tensors["layers.0.router.first"].shape == (3, HIDDEN)
    assert plan.gates()[0].mlp_extra_bytes == 4 * 3 * (HIDDEN + FFN)
    step = loaded.record.step
    read = LAYERS * 4 * 3 * (HIDDEN + FFN)
    assert plan.predicted.mlp_bytes_frac == pytest.approx(0.5 - read / step.mlp_total)


def test_an_interrupted_training_goes_on_with_the_layer_that_was_missing(
    loaded: LoadedModel, blocks: Sequences, tmp_path: Path
) -> None:
    text = "dejavu:epochs=2@0.5"
    whole = fitted(text, loaded, of_blocks(loaded, blocks, PROMPT, Silent(), Folder(tmp_path)))
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == LAYERS
    marked = tensors.read(parts[0]) | {"facts": torch.tensor([0.125, 1.0], dtype=torch.float64)}
    tensors.write(parts[0], marked)
    parts[1].unlink()
    again = fitted(text, loaded, of_blocks(loaded, blocks, PROMPT, Silent(), Folder(tmp_path)))
    assert again.fit.layers[0].recall == 0.125
    assert again.fit.layers[1] == whole.fit.layers[1]
    assert all(torch.equal(value, again.fit.tensors[name]) for name, value in whole.fit.tensors.items())
    other = fitted("dejavu:epochs=2@0.75", loaded, of_blocks(loaded, blocks, PROMPT, Silent(), Folder(tmp_path)))
    assert other.fit.layers[0].recall != 0.125


def test_routers_come_from_a_file_that_fits(loaded: LoadedModel, calibration: TextCalibration, tmp_path: Path) -> None:
    trained = fitted("dejavu:epochs=2@0.5", loaded, calibration)
    path = tmp_path / "plan.safetensors"
    tensors.write(path, trained.fit.tensors)
    plan = fitted(f"dejavu:weights={path}@0.75", loaded, calibration)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors at all")
    with pytest.raises(PlanError, match="no routers can be read"):
        fitted(f"dejavu:weights={damaged}@0.5", loaded, calibration)
    assert plan.fit.layers[0].kept == FFN // 4
    assert plan.fit.layers[0].recall is None
    assert torch.equal(plan.fit.tensors["layers.1.router.second"], trained.fit.tensors["layers.1.router.second"])


def test_a_plan_is_known_by_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    name = f"dejavu:weights={path}@0.5"
    with pytest.raises(PlanError, match="there is no file"):
        identity_of(name)
    path.write_bytes(b"one")
    first = identity_of(name)
    path.write_bytes(b"two")
    assert identity_of(name) != first
    assert identity_of("dejavu@0.5") == "dejavu@0.5"


@pytest.mark.parametrize(("change", "what"), [
    ({"layers.1.router.first": torch.zeros(5, HIDDEN + 1)}, "does not fit the model, whose layers read 32 channels"),
    ({"layers.1.router.second": torch.zeros(FFN, 4)}, "does not fit the model"),
    ({"layers.1.router.second": torch.full((FFN, 5), torch.nan)}, "NaN or infinite"),
    ({"layers.0.router.first": None}, "holds no router for layer 0"),
])  # fmt: skip
def test_a_router_file_that_does_not_fit_is_refused(
    change: dict[str, Tensor | None], what: str, loaded: LoadedModel, calibration: TextCalibration, tmp_path: Path
) -> None:
    stored = {}
    for layer in range(LAYERS):
        stored |= {f"layers.{layer}.router.first": torch.zeros(5, HIDDEN)}
        stored |= {f"layers.{layer}.router.second": torch.zeros(FFN, 5)}
    path = tmp_path / "routers.safetensors"
    tensors.write(path, {name: value for name, value in (stored | change).items() if value is not None})
    with pytest.raises(PlanError, match=what):
        fitted(f"dejavu:weights={path}@0.5", loaded, calibration)


def test_a_plan_whose_router_does_not_fit_is_refused(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("dejavu:epochs=1@0.5", loaded, calibration)
    check_layers(plan, LAYERS, unit_widths(loaded.sites))
    plan.fit.tensors["layers.1.router.first"] = torch.zeros(4, HIDDEN - 2)
    with pytest.raises(PlanError, match=r"layer 1: a router of .* does not fit the model"):
        check_layers(plan, LAYERS, unit_widths(loaded.sites))


def test_training_that_diverges_is_a_clear_error(loaded: LoadedModel, calibration: TextCalibration) -> None:
    with pytest.raises(PlanError, match=r"training the router of layer 0 failed: .* in epoch 1") as caught:
        fitted("dejavu:rate=1e38@0.5", loaded, calibration)
    assert "--set rate=1e+37" in caught.value.hint


@pytest.mark.parametrize(("options", "what"), [
    ("rank=0", "rank must be at least 1"), ("epochs=0", "epochs must be at least 1"), ("rate=0", "must be above 0"),
    ("rate=nan", "rate must be above 0"), ("layers=3-1", "layers cannot be '3-1'"), ("layers=x", "layers cannot be"),
    ("input=sequental", "input cannot be 'sequental'"), ("tokens=many", "tokens must be a int"),
    ("seed=-1", "seed must be from 0"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: str, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        parse(f"dejavu:{options}@0.5")


def test_a_layer_that_the_model_lacks_is_refused(loaded: LoadedModel, calibration: TextCalibration) -> None:
    with pytest.raises(PlanError, match="there is no layer 2, the model has layers 0 to 1"):
        fitted("dejavu:layers=0+2@0.5", loaded, calibration)


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "phi3", "gptj"])
def test_other_families_are_served(model_type: str, tiny_loaded, blocks: Sequences) -> None:
    loaded = tiny_loaded(model_type)
    plan = fitted("dejavu:epochs=1,input=parallel@0.5", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))
    probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
    with probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=token_ids(1, BLOCK))
    assert probe.kept_frac() == [0.5] * LAYERS
