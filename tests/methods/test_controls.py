"""The control of a prompt method: one mask for all text by the method's own statistic, against naive loops."""

from collections.abc import Callable
from math import floor

import pytest
from tiny import FFN, LAYERS
from torch import Tensor
from torch.nn import functional as F

from actsparse.core.masks import kept_count
from actsparse.errors import PlanError
from actsparse.methods.gates import FixedGate
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.pipelines.calibration import TextCalibration
from actsparse.pipelines.plans import build, controls_of
from actsparse.results import SiteKind, Sparsity

Dense = Callable[[SiteKind, int], Tensor]


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]


def masks_of(plan: Plan) -> list[list[int]]:
    found = []
    for gates in plan.gates():
        assert isinstance(gates.neurons, FixedGate)
        found.append(gates.neurons.mask.nonzero().squeeze(1).tolist())
    return found


def neurons(share: float) -> Sparsity:
    """What a plan dropped that drops neurons alone."""
    return Sparsity(neuron_frac=share, mlp_bytes_frac=share, model_bytes_frac=share / 2)


@pytest.mark.parametrize("token_frac", [0.2, 0.4])
def test_static_by_coreinfer_counts_all_calibration_tokens(
    token_frac: float, loaded: LoadedModel, calibration: TextCalibration, dense: Dense
) -> None:
    found = masks_of(fitted(f"static:stat=coreinfer,token_frac={token_frac}@0.5", loaded, calibration))
    top = max(1, floor(token_frac * FFN + 0.5))
    for layer in range(LAYERS):
        counts = [0] * FFN
        for row in dense(SiteKind.NEURON, layer).flatten(0, 1).float().abs().tolist():
            for i in sorted(range(FFN), key=lambda i: (-row[i], i))[:top]:
                counts[i] += 1
        assert found[layer] == sorted(sorted(range(FFN), key=lambda i: (-counts[i], i))[: FFN // 2])


@pytest.mark.parametrize(("source", "kind"), [("gate", SiteKind.GATE), ("up", SiteKind.UP), ("n", SiteKind.NEURON)])
def test_static_by_griffin_of_another_source(
    source: str, kind: SiteKind, loaded: LoadedModel, calibration: TextCalibration, dense: Dense, norms: list[Tensor]
) -> None:
    found = masks_of(fitted(f"static:stat=griffin,source={source}@0.5", loaded, calibration))
    for layer in range(LAYERS):
        rows = dense(kind, layer).flatten(0, 1) * (norms[layer] if source == "n" else 1)
        scores = F.normalize(rows, dim=1).square().mean(dim=0).sqrt()
        assert found[layer] == sorted(scores.topk(kept_count(0.5, FFN)).indices.tolist())


def test_static_experts_have_the_best_mean_score(
    loaded: LoadedModel, calibration: TextCalibration, blocks, dense: Dense
) -> None:
    plan = fitted("moefication:neurons=6,router=oracle,routing=static@0.5", loaded, calibration)
    for layer, kept in enumerate(masks_of(plan)):
        experts = plan.fit.tensors[f"layers.{layer}.experts"].tolist()
        mean = dense(SiteKind.NEURON, layer).flatten(0, 1).float().clamp(min=0).double().mean(dim=0)
        sums = [sum(float(mean[i]) for i in range(FFN) if experts[i] == e) for e in range(FFN // 6)]
        best = sorted(range(FFN // 6), key=lambda e: -sums[e])[: FFN // 12]
        assert kept == [i for i in range(FFN) if experts[i] in best]
    assert plan.predicted.neuron_frac == 0.5


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("griffin@0.5", "static:stat=griffin"),
        ("tda:source=n@0.5", "static:stat=griffin,source=n"),
        ("coreinfer@0.5", "static:stat=coreinfer"),
        ("coreinfer:token_frac=0.2@0.5", "static:stat=coreinfer,token_frac=0.2"),
        ("moefication:neurons=6,routing=sequence,refresh_every=3@0.5", "moefication:neurons=6,routing=static"),
        ("moefication@0.5", None),
        ("cats@0.5", None),
        ("teal@0.5", "channels-static:stat=mean_abs"),
        ("wina@0.5", None),
    ],
)
def test_a_prompt_method_names_its_control(text: str, control: str | None) -> None:
    assert parse(text).method.control == control
    assert control is None or parse(f"{control}@0.5").method.control is None


def test_an_evaluation_adds_the_controls(loaded: LoadedModel, calibration: TextCalibration) -> None:
    names = ["coreinfer@0.5", "moefication:neurons=6,routing=sequence@0.25"]
    groups = build(names, loaded, calibration, loaded.record.step)
    found = {name: neurons(share) for name, share in zip(names, (0.503, 0.25), strict=True)}
    added = controls_of(groups, found, loaded, calibration, loaded.record.step)
    usual = ("static:stat=griffin", "static", "random")
    wanted = [*(f"{one}@0.25" for one in usual), "moefication:neurons=6,routing=static@0.25"]
    assert [group.name for group in added] == [*wanted, *(f"{one}@0.5" for one in usual), "static:stat=coreinfer@0.5"]
    assert not any(group.named for group in added)


@pytest.mark.parametrize(
    ("name", "dropped", "shares"),
    [
        ("auto:methods=cats@0.1", 0.247, {"0.247"}),  # of the bytes
        ("tda@0.5", 0.524, {"0.524"}),
        ("griffin:protect=0.1@0.5", 0.452, {"0.452"}),
    ],
)
def test_controls_drop_what_the_plan_dropped_of_the_neurons(
    name: str, dropped: float, shares: set[str], loaded: LoadedModel, calibration: TextCalibration
) -> None:
    groups = build([name], loaded, calibration, loaded.record.step)
    added = controls_of(groups, {name: neurons(dropped)}, loaded, calibration, loaded.record.step)
    assert {group.name.partition("@")[2] for group in added} == shares


def test_bad_options_of_static() -> None:
    with pytest.raises(PlanError, match="static: token_frac must be above 0"):
        parse("static:stat=coreinfer,token_frac=0@0.5")
    with pytest.raises(PlanError, match="static: source=up needs a gated FFN"):
        parse("static:stat=griffin,source=up@0.5").method.check(gated=False)
