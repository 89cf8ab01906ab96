"""The contract of every method in the registry, on a tiny model and a calibration text."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from math import floor, sqrt
from pathlib import Path

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from tiny import FFN, HIDDEN, LAYERS, token_ids
from torch import Tensor

from actsparse.core.masks import kept_count
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import PlanError
from actsparse.methods import registry
from actsparse.methods.gates import FixedGate, PrefillGate
from actsparse.methods.griffin import Griffin
from actsparse.methods.plan import Plan, check_layers, check_model, fit_plan, from_record, to_record
from actsparse.methods.registry import all_methods, method_class
from actsparse.methods.short import parse
from actsparse.methods.tda import over, threshold_for_share
from actsparse.models.load import LoadedModel
from actsparse.models.sites import unit_widths
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import SiteKind, Sparsity, ThresholdPlan, Unit
from actsparse.store import tensors
from actsparse.store.codec import decode, encode

QUICK = {"dejavu": "dejavu:epochs=2,batch=32", "moefication": "moefication:neurons=2"}
"""Options under which a method suits a model of 48 neurons and a test of a second."""
VARIANTS = (
    "moefication:neurons=2,routing=sequence",
    "moefication:neurons=2,routing=static",
    "moefication:neurons=2,router=mlp,epochs=2,batch=32",
    "dejavu:input=lookahead,epochs=2,batch=32",
    "static:stat=coreinfer",
    "tda:length_aware=true",
    "teal:mode=topk",
    "wina:mode=threshold",
)
"""Options under which a method decides in another way."""
every_method = pytest.mark.parametrize(
    "name",
    [
        *(QUICK.get(name, name) for name in all_methods() if name != "auto" and not name.startswith("heads-")),
        *VARIANTS,
    ],
)
"""Methods over neurons or channels; those over heads have `test_heads.py`, the mix of several `test_auto.py`."""


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> list[Plan]:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)


def kept_on(plan: Plan, loaded: LoadedModel, ids: Tensor, prompt: int = PROMPT) -> list[float]:
    """The share kept by unit and layer at dense inputs, block by block."""
    return list(kept_by_unit(plan, loaded, ids, prompt).values())


def kept_by_unit(plan: Plan, loaded: LoadedModel, ids: Tensor, prompt: int) -> dict[tuple[Unit, int], float]:
    kept: dict[tuple[Unit, int], list[float]] = {}
    for block in ids:
        probe = MaskedPlan(plan.gates(), prompt_length=prompt, sink_tokens=SINK)
        with probed(loaded.sites, [probe]), torch.no_grad():
            loaded.model(input_ids=block[None], use_cache=False)
        for place, tally in sorted(probe.tallies.items()):
            kept.setdefault(place, []).append(tally.kept_frac)
    return {place: sum(shares) / len(shares) for place, shares in kept.items()}


def own_share(sparsity: Sparsity | None) -> float:
    """Sparsity on the basis of the method's own units."""
    assert sparsity is not None
    found = [one for one in (sparsity.neuron_frac, sparsity.channel_frac, sparsity.head_frac) if one is not None]
    assert len(found) == 1
    return found[0]


def by_size(shares: dict[tuple[Unit, int], float], loaded: LoadedModel) -> float:
    """The mean of shares, projections weighted by their size."""
    projections = loaded.sites.layers[0].projections
    sizes = {at: projections[at[0]].matrix().numel() if at[0] in projections else 1 for at in shares}
    return sum(shares[at] * size for at, size in sizes.items()) / sum(sizes.values())


def counted_from(plan: Plan) -> int:
    """A mask of the prompt starts after it; the others are fitted on every position after the sink tokens."""
    return PROMPT if any(isinstance(gates.neurons, PrefillGate) for gates in plan.gates()) else SINK


@every_method
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_target_0_keeps_all_and_equals_dense(
    name: str, seed: int, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    ids = token_ids(2, BLOCK, seed=100 + seed)
    with torch.no_grad():
        dense = loaded.model(input_ids=ids, use_cache=False).logits
        for plan in fitted(f"{name}@0", loaded, calibration):
            run = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
            with masked(loaded.sites, run):
                sparse = loaded.model(input_ids=ids, use_cache=False).logits
            assert run.tallies
            assert all(tally.kept_frac == 1.0 for tally in run.tallies.values())
            assert torch.equal(sparse, dense)
            assert own_share(plan.predicted) == 0


@every_method
@pytest.mark.parametrize("drop", [0.25, 0.5, 0.8])
def test_realised_density_is_the_target_on_the_fitting_text(
    name: str, drop: float, loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    for plan in fitted(f"{name}@{drop}", loaded, calibration):
        kept = kept_by_unit(plan, loaded, blocks.stack(), counted_from(plan))
        widths = unit_widths(loaded.sites)
        for (unit, _), share in kept.items():
            assert share == pytest.approx(1 - drop, abs=0.5 / widths[unit] + 1e-3)
        assert own_share(plan.predicted) == pytest.approx(drop, abs=0.5 / min(widths[unit] for unit, _ in kept))
        assert own_share(plan.realised) == pytest.approx(1 - by_size(kept, loaded), abs=2e-3)


@every_method
def test_more_dropped_never_keeps_more(
    name: str, loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    ids = blocks.stack()[:2]
    kept = [kept_on(fitted(f"{name}@{drop}", loaded, calibration)[0], loaded, ids) for drop in (0, 0.1, 0.3, 0.6, 0.9)]
    for place in range(len(kept[0])):
        shares = [one[place] for one in kept]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1] > 0


@every_method
def test_bytes_follow_the_matrices_that_a_method_saves(
    name: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"{name}@0.5", loaded, calibration)[0]
    step, saves, gates = loaded.record.step, plan.method.saves, plan.gates()
    dropped = {
        (one.unit, one.layer): share for one, share in zip(plan.fit.layers, plan.fit.predicted_drop, strict=True)
    }
    mlp = -sum(layer.mlp_extra_bytes for layer in gates)
    attention = -sum(layer.attention_extra_bytes for layer in gates)
    for (unit, _), share in dropped.items():
        mlp += share * sum(size for name, size in step.mlp.items() if name in saves and unit in (Unit.NEURON, name))
        attention += share * sum(size for name, size in step.projections.items() if name in saves and unit == name)
    assert sum(dropped.values()) > 0
    assert plan.predicted.mlp_bytes_frac == pytest.approx(mlp / step.mlp_total)
    assert plan.predicted.model_bytes_frac == pytest.approx((mlp + attention) / step.total)


@every_method
def test_fits_are_deterministic(name: str, loaded: LoadedModel, blocks: Sequences) -> None:
    first, second = (fitted(f"{name}@0.4", loaded, of_blocks(loaded, blocks, PROMPT, Silent())) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.fit.layers == other.fit.layers
        assert one.fit.tensors.keys() == other.fit.tensors.keys()
        assert all(torch.equal(value, other.fit.tensors[key]) for key, value in one.fit.tensors.items())


@every_method
def test_a_plan_goes_through_its_record_and_tensors(
    name: str, loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences, tmp_path: Path
) -> None:
    for plan in fitted(f"{name}@0.4", loaded, calibration):
        tensors.write(tmp_path / "plan.safetensors", plan.fit.tensors)
        record = decode(encode(to_record(plan, loaded.record, blocks.record)), ThresholdPlan, "plan.json")
        again = from_record(record, tensors.read(tmp_path / "plan.safetensors"), "runs/p")
        assert again.method == plan.method
        assert (again.amount, again.target, again.predicted) == (plan.amount, plan.target, plan.predicted)
        ids = token_ids(2, BLOCK, seed=5)
        assert kept_on(again, loaded, ids) == kept_on(plan, loaded, ids)
        with torch.no_grad():
            outputs = []
            for one in (plan, again):
                with masked(loaded.sites, MaskedPlan(one.gates(), prompt_length=PROMPT, sink_tokens=SINK)):
                    outputs.append(loaded.model(input_ids=ids, use_cache=False).logits)
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "text", ["griffin:compensate=true,protect=0.1@0.4", "cats:allocation=sensitivity@0.4", "teal:allocation=greedy@0.4"]
)
def test_a_record_keeps_options_and_add_ons_apart(
    text: str, loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    plan = fitted(text, loaded, calibration)[0]
    record = decode(encode(to_record(plan, loaded.record, blocks.record)), ThresholdPlan, "plan.json")
    again = from_record(record, plan.fit.tensors, "runs/p")
    assert (again.method, again.add_ons) == (plan.method, plan.add_ons) == (parse(text).method, parse(text).add_ons)


@every_method
def test_a_plan_of_another_model_is_refused(
    name: str, loaded: LoadedModel, calibration: TextCalibration, tiny_loaded: Callable
) -> None:
    plan = fitted(f"{name}@0.4", loaded, calibration)[0]
    record = to_record(plan, loaded.record, None)
    check_model(record, "runs/p", loaded.record)
    with pytest.raises(PlanError) as caught:
        check_model(record, "runs/p", tiny_loaded("qwen3").record)
    assert "runs/p was fitted to tiny-llama, not to tiny-qwen3" in caught.value.what
    assert "actsparse threshold" in caught.value.hint


def test_a_plan_of_other_layers_is_refused(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("griffin@0.4", loaded, calibration)[0]
    check_layers(plan, LAYERS, {Unit.NEURON: FFN, Unit.UP: HIDDEN})
    with pytest.raises(PlanError, match="the model has 3"):
        check_layers(plan, 3, {Unit.NEURON: FFN, Unit.UP: HIDDEN})


def test_a_plan_with_unknown_options_is_refused(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("griffin@0.4", loaded, calibration)[0]
    record = replace(to_record(plan, loaded.record, None), options={"k": 3})
    with pytest.raises(PlanError, match="options that griffin lacks"):
        from_record(record, {}, "runs/p")


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("grifin@0.5", "'grifin'", "'griffin'"),
        ("@0.5", "no method ''", "known:"),
        ("griffin", "does not say how much", "griffin@0.5"),
        ("griffin@", "not a number: ''", "0.5"),
        ("griffin@half", "'half'", "50%"),
        ("griffin@1", "below 1", "0.5"),
        ("griffin@-0.1", "at least 0", "0.5"),
        ("griffin@120%", "120%", "0.5"),
        ("griffin@nan", "nan", "0.5"),
        ("griffin@0.5@0.6", "0.5@0.6", "0.5"),
        ("tda:target_error=0.2@0.5", "both a share and an error target", "one of the two"),
        ("tda:target_error=2", "target_error", "0.5"),
        ("static:stta=griffin@0.5", "no option 'stta'", "'stat'"),
        ("static:stat=mean@0.5", "stat cannot be 'mean'", "mean_n, griffin"),
        ("random:seed=x@0.5", "seed must be a int, not 'x'", "value"),
        ("random:seed@0.5", "'seed' is not key=value", "key=value"),
        ("random:seed=@0.5", "is not key=value", "key=value"),
        ("random:k=3@0.5", "no option 'k'", "seed"),
    ],
)
def test_a_short_form_that_does_not_fit(text: str, what: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse(text)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_short_forms_that_fit() -> None:
    assert parse("griffin@50%").budget.drop == 0.5
    assert parse("static:stat=griffin@0.25").method.options == {"stat": "griffin"}
    assert parse("random:seed=4@0.5").method.options == {"seed": 4}
    assert parse("tda:target=20%").budget.target_error == pytest.approx(0.2)
    assert (parse("tda").budget.drop, parse("tda").budget.target_error) == (None, None)
    assert parse("griffin@0.5").text == "griffin@0.5"


def test_a_gated_method_is_refused_on_a_plain_ffn() -> None:
    class GatedOnly(Griffin):
        name = "gated-only"
        gated_only = True

    with pytest.raises(PlanError, match="gated-only needs a gated FFN"):
        GatedOnly().check(gated=False)
    GatedOnly().check(gated=True)


def test_random_is_three_seeds_of_the_definition(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plans = fitted("random@0.3", loaded, calibration)
    assert len(plans) == 3
    k = max(1, floor(0.7 * FFN + 0.5))
    for seed, plan in enumerate(plans):
        g = torch.Generator().manual_seed(seed)
        for gate in (layer.neurons for layer in plan.gates()):
            naive = sorted(torch.randperm(FFN, generator=g)[:k].tolist())
            assert isinstance(gate, FixedGate)
            assert gate.mask.nonzero().squeeze(1).tolist() == naive
    alone = fitted("random:seed=1@0.3", loaded, calibration)
    assert len(alone) == 1
    assert torch.equal(alone[0].gates()[1].neurons.mask, plans[1].gates()[1].neurons.mask)


def test_static_masks_are_the_top_of_their_statistic(
    loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    from actsparse.models.taps import tapped

    rows: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    with tapped(loaded.sites, {SiteKind.NEURON: lambda s, a: rows[s.layer].append(a[0, SINK:].double())}):
        for block in blocks.stack():
            loaded.model(input_ids=block[None], use_cache=False)
    for name, stat in (("mean_n", 0), ("griffin", 1)):
        plan = fitted(f"static:stat={name}@0.5", loaded, calibration)[0]
        for layer, gate in enumerate(plan.gates()):
            a = torch.cat(rows[layer]).detach()
            norms = loaded.sites.layers[layer].down.weight.double().norm(dim=0)
            scores = ((a / a.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt() if stat else a.abs().mean(0) * norms
            naive = sorted(scores.topk(kept_count(0.5, FFN)).indices.tolist())
            assert gate.neurons.mask.nonzero().squeeze(1).tolist() == naive


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.999, 1.0])
def test_threshold_for_share_against_a_sort(density: float) -> None:
    scores = torch.rand(3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ordered = sorted(scores.flatten().tolist(), reverse=True)
    naive = ordered[max(1, floor(density * len(ordered) + 0.5)) - 1]
    assert threshold_for_share(scores, density) == naive
    assert int((scores >= naive).sum()) == max(1, floor(density * len(ordered) + 0.5))


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_tda_reaches_its_error_target_on_calibration(
    target: float, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"tda:target_error={target}", loaded, calibration)[0]
    replay = calibration.prompts()
    for layer in plan.fit.layers:
        scores = replay.statistics(layer.layer) * sqrt(FFN)
        assert replay.mask_error(layer.layer, over(scores, layer.threshold)) <= target
        larger = layer.threshold + float(scores.max()) * 2.0**-19
        assert replay.mask_error(layer.layer, over(scores, larger)) > target
        kept = float(over(scores, layer.threshold).double().mean())
        assert plan.fit.predicted_drop[layer.layer] == pytest.approx(1 - kept)


def test_an_error_target_of_zero_is_not_the_default(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("tda:target_error=0", loaded, calibration)[0]
    assert plan.predicted.neuron_frac == 0
    assert (
        fitted("tda", loaded, calibration)[0].fit.layers
        == fitted("tda:target_error=0.2", loaded, calibration)[0].fit.layers
    )


def test_mask_error_against_a_loop(loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences) -> None:
    replay = calibration.prompts()
    masks = torch.rand(len(blocks), FFN, generator=torch.Generator().manual_seed(9)) < 0.5
    down = loaded.sites.layers[1].down.weight.detach().double()
    ratios = [
        float((down @ (a * ~mask)).norm() / (down @ a).norm())
        for block, mask in zip(replay.continuations[1].double(), masks, strict=True)
        for a in block
    ]
    assert len(ratios) == len(blocks) * (BLOCK - PROMPT)
    assert replay.mask_error(1, masks) == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Pretend that a package adds an entry point."""

    def add(name: str, value: str) -> None:
        point = EntryPoint(name=name, value=value, group="actsparse.methods")
        monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "actsparse.methods" else [])
        all_methods.cache_clear()

    yield add
    all_methods.cache_clear()


def test_other_packages_add_methods(installed: Callable) -> None:
    installed("our-griffin", "actsparse.methods.griffin:Griffin")
    assert method_class("our-griffin") is Griffin
    assert parse("our-griffin@0.5").method == Griffin()


def test_a_name_that_is_taken_is_refused(installed: Callable) -> None:
    installed("tda", "actsparse.methods.griffin:Griffin")
    with pytest.raises(PlanError, match="'tda', a name that is taken"):
        all_methods()


def test_a_package_that_cannot_be_imported_is_named(installed: Callable) -> None:
    installed("broken", "no_such_package_at_all:Method")
    with pytest.raises(PlanError, match="no_such_package_at_all"):
        all_methods()
