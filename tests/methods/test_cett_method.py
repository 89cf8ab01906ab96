"""CETT as a method: thresholds by share and by error, against loops over tokens."""

import pytest
import torch
from tiny import LAYERS
from torch import Tensor

from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.results import SiteKind


def mean_cett(a: Tensor, down: Tensor, eps: float) -> float:
    """The mean over tokens of ||sum of dropped n_i|| / ||FFN||."""
    norms = down.norm(dim=0)
    ratios = []
    for token in a:
        dropped = torch.where(token.abs() * norms < eps, token, 0.0)
        ratios.append(float((down @ dropped).norm() / (down @ token).norm()))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.5])
def test_the_threshold_is_the_largest_that_meets_the_target(target, loaded, calibration, dense) -> None:
    plan = fit_plan(parse(f"cett:target_error={target}"), calibration, loaded.record.step, gated=True)[0]
    for layer, gate in enumerate(layer.neurons for layer in plan.gates()):
        a, down = dense(SiteKind.NEURON, layer).flatten(0, 1), loaded.sites.layers[layer].down.weight.detach().double()
        eps = plan.fit.layers[layer].threshold
        assert mean_cett(a, down, eps) <= target + 1e-5
        assert mean_cett(a, down, eps * 1.005) > target
        assert torch.equal(gate.rule.keep(a.float()), a.abs() * down.norm(dim=0) >= eps)
        kept = float(gate.rule.keep(a.float()).double().mean())
        assert plan.fit.realised_drop[layer] == pytest.approx(1 - kept, abs=1e-3)


def test_the_default_is_a_cett_of_one_fifth(loaded, calibration) -> None:
    plans = [
        fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0] for text in ("cett", "cett:target=0.2")
    ]
    assert plans[0].fit.layers == plans[1].fit.layers


def test_an_error_of_zero_drops_zeros_at_most(loaded, calibration) -> None:
    plan = fit_plan(parse("cett:target_error=0"), calibration, loaded.record.step, gated=True)[0]
    assert max(plan.fit.realised_drop) < 1e-3


@pytest.mark.parametrize("drop", [0.25, 0.6])
def test_a_share_is_the_quantile_of_the_scores(drop, loaded, calibration, dense, norms) -> None:
    plan = fit_plan(parse(f"cett@{drop}"), calibration, loaded.record.step, gated=True)[0]
    assert plan.predicted.mlp_bytes_frac == pytest.approx(drop / 3)
    for layer in range(LAYERS):
        scores = sorted((dense(SiteKind.NEURON, layer).abs() * norms[layer]).flatten().tolist())
        assert plan.fit.layers[layer].threshold == pytest.approx(scores[int(drop * len(scores))], rel=6e-4)
