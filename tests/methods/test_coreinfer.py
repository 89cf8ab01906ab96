"""CoreInfer against counting by hand."""

from math import floor

import pytest
import torch
from tiny import FFN

from actsparse.errors import PlanError
from actsparse.methods.coreinfer import CoreShare
from actsparse.methods.gates import PrefillGate
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.results import SiteKind


@pytest.mark.parametrize("token_frac", [0.1, 0.4, 1.0])
def test_shares_and_masks_against_counting(token_frac, loaded, calibration, dense) -> None:
    text = f"coreinfer:token_frac={token_frac}@0.5"
    gate = fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0].gates()[0].neurons
    assert isinstance(gate, PrefillGate)
    rows = dense(SiteKind.NEURON, 0)[0, :12].float()
    top = max(1, floor(token_frac * FFN + 0.5))
    counts = [0] * FFN
    for row in rows.abs().tolist():
        for i in sorted(range(FFN), key=lambda i: (-row[i], i))[:top]:
            counts[i] += 1
    statistic = gate.statistic()
    statistic.add(rows[:5])
    statistic.add(rows[5:])
    assert statistic.value().tolist() == pytest.approx([count / 12 for count in counts])
    kept = sorted(range(FFN), key=lambda i: (-counts[i], i))[: FFN // 2]
    assert gate.rule(statistic.value()).nonzero().squeeze(1).tolist() == sorted(kept)


def test_negative_activations_count_and_zeros_never_do() -> None:
    share = CoreShare(0.5)
    share.add(torch.tensor([[-3.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert share.value().tolist() == [0.5, 0.5, 0.0, 0.0]
    share = CoreShare(1.0)
    share.add(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert share.value().tolist() == [1.0, 0.0, 0.0, 0.0]


def test_before_the_first_token_there_is_no_share() -> None:
    with pytest.raises(ValueError, match="no token"):
        CoreShare(0.4).value()


@pytest.mark.parametrize("token_frac", ["0", "1.5", "-0.4", "nan"])
def test_an_impossible_top_set_is_refused(token_frac) -> None:
    with pytest.raises(PlanError, match="token_frac must be above 0"):
        parse(f"coreinfer:token_frac={token_frac}@0.5")
