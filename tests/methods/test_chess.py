"""CHESS against its definition, sorted entry by entry."""

import pytest
import torch
from tiny import FFN, LAYERS

from actsparse.methods.chess import neuron_thresholds
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.results import SiteKind


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.7])
def test_thresholds_against_a_sort(drop, loaded, calibration, dense) -> None:
    plan = fit_plan(parse(f"chess@{drop}"), calibration, loaded.record.step, gated=True)[0]
    for layer in range(LAYERS):
        gate, up = (dense(kind, layer).flatten(0, 1) for kind in (SiteKind.GATE, SiteKind.UP))
        square_up = up.square().mean(dim=0)
        scores = sorted((gate.square() * square_up).flatten().tolist())
        theta = scores[int(drop * len(scores))]
        tau = (theta / square_up).sqrt()
        assert plan.fit.layers[layer].threshold == pytest.approx(theta**0.5, rel=6e-4)
        mask, naive = plan.gates()[layer].neurons.rule.keep(gate.float()), gate.abs() >= tau
        unsure = ((gate.abs() / tau) - 1).abs() < 6e-4
        assert torch.equal(mask | unsure, naive | unsure)
        assert unsure.float().mean() < 0.01
        assert mask.double().mean() == pytest.approx(1 - drop, abs=0.01)
        assert plan.fit.realised_drop[layer] == pytest.approx(1 - float(mask.double().mean()), abs=1e-3)


def test_thresholds_differ_from_neuron_to_neuron(loaded, calibration, dense) -> None:
    chess, cats = (
        fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0].gates()[0].neurons
        for name in ("chess", "cats")
    )
    gate = dense(SiteKind.GATE, 0).float()
    assert not torch.equal(chess.rule.keep(gate), cats.rule.keep(gate))


def test_a_neuron_whose_up_is_always_zero_is_dropped_unless_nothing_is() -> None:
    usual_up = torch.ones(FFN)
    usual_up[3] = 0
    assert neuron_thresholds(0.5, usual_up)[3] == float("inf")
    assert neuron_thresholds(0.5, usual_up)[0] == 0.5
    assert neuron_thresholds(0.0, usual_up).tolist() == [0.0] * FFN
