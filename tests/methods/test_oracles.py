"""The oracles against the exact top-k of their definition."""

from math import floor

import pytest
import torch
from tiny import FFN, LAYERS
from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.gates import TokenGate
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.results import SiteKind

SITES = {
    "oracle-a": SiteKind.NEURON,
    "oracle-n": SiteKind.NEURON,
    "oracle-gate": SiteKind.GATE,
    "oracle-up": SiteKind.UP,
}
every_oracle = pytest.mark.parametrize("name", SITES)


def naive(scores: Tensor, k: int) -> Tensor:
    """The k largest of every row, among equals the lower index."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, kept in zip(scores.flatten(0, -2).tolist(), mask.flatten(0, -2), strict=True):
        kept[sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]] = True
    return mask


@every_oracle
@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 0.7, 0.999])
def test_gates_keep_the_exact_top_of_every_token(name, drop, loaded, calibration, dense, norms) -> None:
    plan = fit_plan(parse(f"{name}@{drop}"), calibration, loaded.record.step, gated=True)[0]
    k = max(1, floor((1 - drop) * FFN + 0.5))
    for layer, gate in enumerate(layer.neurons for layer in plan.gates()):
        assert isinstance(gate, TokenGate)
        assert gate.site is SITES[name]
        x = dense(SITES[name], layer)[:2].float()
        scores = x.abs() * norms[layer].float() if name == "oracle-n" else x.abs()
        mask = gate.rule.keep(x)
        assert torch.equal(mask, naive(scores, k))
        assert (mask.sum(dim=-1) == k).all()


def test_the_oracles_differ(loaded, calibration, dense) -> None:
    one, other = (
        fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0].gates()[0].neurons.rule.keep
        for name in ("oracle-a", "oracle-n")
    )
    a = dense(SiteKind.NEURON, 0)
    assert not torch.equal(one(a), other(a))


@every_oracle
def test_rows_of_equal_scores_keep_the_count(name, loaded, calibration) -> None:
    gate = fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0].gates()[0].neurons
    assert gate.rule.keep(torch.zeros(3, FFN)).sum(dim=-1).tolist() == [FFN // 2] * 3


@every_oracle
def test_bytes_are_those_of_a_mask_known_beforehand(name, loaded, calibration) -> None:
    plan = fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0]
    assert plan.predicted.mlp_bytes_frac == pytest.approx(0.5)
    assert plan.method.ideal
    assert not plan.method.has_engine


@pytest.mark.parametrize("name", ["oracle-gate", "oracle-up", "chess", "countdown"])
def test_what_reads_a_gate_is_refused_on_a_plain_ffn(name, tiny_loaded, calibration) -> None:
    with pytest.raises(PlanError, match=f"{name} needs a gated FFN"):
        fit_plan(parse(f"{name}@0.5"), calibration, tiny_loaded("opt").record.step, gated=False)


@pytest.mark.parametrize("name", ["oracle-a", "oracle-n", "cett", "coreinfer", "tda:source=n"])
def test_what_reads_neurons_serves_a_plain_ffn(name, tiny_loaded, blocks) -> None:
    from actsparse.pipelines.calibration import of_blocks
    from actsparse.pipelines.progress import Silent

    opt = tiny_loaded("opt")
    plan = fit_plan(parse(f"{name}@0.5"), of_blocks(opt, blocks, 16, Silent()), opt.record.step, gated=False)[0]
    assert len(plan.gates()) == LAYERS
    assert plan.predicted.mlp_bytes_frac == pytest.approx(0.25 if name == "cett" else 0.5)
