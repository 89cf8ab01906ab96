"""allocation=sensitivity for methods over neurons: the same mean share, less squared error weighed by its cost."""

import pytest
from tiny import LAYERS

from actsparse.errors import PlanError
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.pipelines.calibration import TextCalibration


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]


@pytest.mark.parametrize("name", ["static:stat=griffin", "cats", "griffin", "tda", "chess"])
def test_layers_drop_different_shares_of_the_same_mean(
    name: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    texts = (f"{name}{',' if ':' in name else ':'}allocation=sensitivity@0.4", f"{name}@0.4")
    plan, uniform = (fitted(text, loaded, calibration) for text in texts)
    assert sum(plan.fit.predicted_drop) / LAYERS == pytest.approx(0.4, abs=0.02)
    assert plan.add_ons.options == {"allocation": "sensitivity"}
    replay = calibration.channels()
    half = fitted(f"{name}@0.4", loaded, calibration).gates()
    errors = calibration.local_errors(half)
    alone = [[gate if at == layer else LayerGates() for at, gate in enumerate(half)] for layer in range(LAYERS)]
    weights = [replay.kl(gates) / error**2 for gates, error in zip(alone, errors, strict=True)]
    costs = [
        sum(weight * error**2 for weight, error in zip(weights, calibration.local_errors(one.gates()), strict=True))
        for one in (plan, uniform)
    ]
    # shares are found between the measured ones, and counts are whole numbers
    assert costs[0] < 1.01 * costs[1]


def test_nothing_dropped_needs_no_allocation(loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted("griffin:allocation=sensitivity@0", loaded, calibration)
    assert set(plan.fit.predicted_drop) == {0.0}


def test_greedy_is_for_channels(loaded: LoadedModel, calibration: TextCalibration) -> None:
    with pytest.raises(PlanError, match="allocation cannot be 'greedy'"):
        parse("griffin:allocation=greedy@0.5")
    assert parse("teal:allocation=greedy@0.5").add_ons.options == {}
