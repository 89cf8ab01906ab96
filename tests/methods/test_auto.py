"""auto: a mix of rules that saves the bytes asked for, at less measured error than its parts used alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lengths import PROMPT
from tiny import LAYERS, token_ids

from actsparse.core.cost import LayerDrops
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.errors import PlanError
from actsparse.methods.plan import Plan, fit_plan, from_record, to_record
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import ThresholdPlan, Unit
from actsparse.store import tensors
from actsparse.store.codec import decode, encode


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=loaded.record.gated)[0]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_share_of_the_models_bytes_is_saved(
    share: float, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"auto@{share}", loaded, calibration)
    assert plan.predicted.model_bytes_frac == pytest.approx(share, abs=0.03)
    assert plan.predicted.model_bytes_frac >= share - 1e-6
    rules = [one.rule.partition("@")[0] for one in plan.fit.layers if one.rule is not None]
    assert rules
    assert set(rules) <= {"teal", "wina", "cats"}
    # what the plan's gates drop is what its entries say
    for layer, gates in enumerate(plan.gates()):
        entries = {one.unit for one in plan.fit.layers if one.layer == layer and one.rule is not None}
        assert entries == set(gates.rules) | ({Unit.NEURON} if gates.neurons else set())


def test_a_budget_of_nothing_is_dense(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("auto@0", loaded, calibration)
    ids = token_ids(2, 30, seed=1)
    run = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=4)
    with torch.no_grad():
        dense = loaded.model(input_ids=ids, use_cache=False).logits
        with masked(loaded.sites, run):
            assert torch.equal(loaded.model(input_ids=ids, use_cache=False).logits, dense)
    assert plan.predicted.model_bytes_frac == 0


def test_the_mix_moves_predictions_less_than_each_rule_alone(loaded: LoadedModel, calibration: TextCalibration) -> None:
    replay = calibration.channels()
    auto = fitted("auto@0.3", loaded, calibration)
    for name in ("teal", "wina"):
        alone = fitted(f"{name}@0.5", loaded, calibration)
        share = 0.3 * 0.5 / alone.predicted.model_bytes_frac
        alone = fitted(f"{name}@{share:.4f}", loaded, calibration)
        assert alone.predicted.model_bytes_frac == pytest.approx(0.3, abs=0.01)
        assert replay.kl(auto.gates()) < replay.kl(alone.gates())


def test_the_frontier_is_reported_and_rises(loaded: LoadedModel, calibration: TextCalibration) -> None:
    frontier = fitted("auto@0.2", loaded, calibration).fit.tensors["frontier"]
    assert frontier.shape == (12, 2)
    assert (frontier[1:] >= frontier[:-1] - 1e-12).all()
    assert frontier[0, 0] >= 0.05


def test_a_quality_limit_lowers_the_budget(loaded: LoadedModel, calibration: TextCalibration) -> None:
    replay = calibration.channels()
    free = fitted("auto@0.4", loaded, calibration)
    limit = replay.kl(free.gates()) / 4
    held = fitted(f"auto:max_kl={limit:.6f}@0.4", loaded, calibration)
    assert replay.kl(held.gates()) <= limit
    assert 0 < held.predicted.model_bytes_frac < free.predicted.model_bytes_frac
    loose = fitted("auto:max_kl=1000@0.2", loaded, calibration)
    assert loose.fit.layers == fitted("auto@0.2", loaded, calibration).fit.layers


def test_a_plan_goes_through_its_record_and_is_deterministic(
    loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences, tmp_path: Path
) -> None:
    plan = fitted("auto@0.3", loaded, calibration)
    tensors.write(tmp_path / "plan.safetensors", plan.fit.tensors)
    record = decode(encode(to_record(plan, loaded.record, blocks.record)), ThresholdPlan, "plan.json")
    again = from_record(record, tensors.read(tmp_path / "plan.safetensors"), "runs/p")
    other = fitted("auto@0.3", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))
    assert other.fit.layers == plan.fit.layers
    ids = token_ids(2, 30, seed=5)
    outputs = []
    for one in (plan, again, other):
        with masked(loaded.sites, MaskedPlan(one.gates(), prompt_length=PROMPT, sink_tokens=4)), torch.no_grad():
            outputs.append(loaded.model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_rules_over_neurons_stand_beside_rules_over_channels(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("auto:methods=teal+cats@0.45", loaded, calibration)
    kinds = {one.unit for one in plan.fit.layers if one.rule is not None}
    assert Unit.NEURON in kinds
    assert kinds - {Unit.NEURON}
    for gates in plan.gates():
        assert gates.neurons is None or Unit.DOWN not in gates.rules
    mixed = LayerDrops(neurons=0.5, neuron_saves=frozenset({"up", "down"}), channels={Unit.GATE: 0.3, Unit.UP: 0.2})
    assert (mixed.unread("gate"), mixed.unread("up"), mixed.unread("down")) == pytest.approx((0.3, 0.6, 0.5))


@pytest.mark.parametrize("family", ["opt", "phi3"])
def test_other_families_are_served(family: str, tiny_loaded: Callable, blocks: Sequences) -> None:
    loaded = tiny_loaded(family)
    plan = fitted("auto:methods=teal+chess@0.2", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))
    assert plan.predicted.model_bytes_frac == pytest.approx(0.2, abs=0.04)
    assert plan.fit.depth == LAYERS


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("auto@0.99", "cannot save 99", "auto@0."),
        ("auto:methods=tda@0.2", "tda has no rule", "teal"),
        ("auto:methods=nothing@0.2", "no method 'nothing'", "known"),
    ],
)
def test_what_cannot_be_mixed_or_reached_is_refused(
    text: str, what: str, hint: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    with pytest.raises(PlanError) as caught:
        fitted(text, loaded, calibration)
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["auto:max_kl=-1@0.2", "auto:methods=+@0.2"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="auto: "):
        parse(text)
