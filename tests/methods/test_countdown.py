"""COUNTDOWN against its definition, sorted entry by entry."""

import pytest
import torch
from tiny import LAYERS

from actsparse.methods.gates import TokenGate
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.results import SiteKind


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.7])
def test_thresholds_against_a_sort(drop, loaded, calibration, dense) -> None:
    plan = fit_plan(parse(f"countdown@{drop}"), calibration, loaded.record.step, gated=True)[0]
    assert plan.predicted.mlp_bytes_frac == pytest.approx(drop * 2 / 3)
    for layer in range(LAYERS):
        up = dense(SiteKind.UP, layer).flatten(0, 1)
        ordered = sorted(up.abs().flatten().tolist())
        threshold = ordered[int(drop * len(ordered))]
        assert plan.fit.layers[layer].threshold == pytest.approx(threshold, rel=6e-4)
        gate = plan.gates()[layer].neurons
        assert isinstance(gate, TokenGate)
        assert gate.site is SiteKind.UP
        naive, unsure = up.abs() >= threshold, (up.abs() / threshold - 1).abs() < 6e-4
        assert torch.equal(gate.rule.keep(up.float()) | unsure, naive | unsure)
