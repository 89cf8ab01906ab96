"""MoE-fication: experts of the definition, the three routers, token and sequence routing, a smaller last expert."""

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from tiny import FFN, HIDDEN, LAYERS, token_ids
from torch import Tensor
from torch.nn import functional as F

from actsparse.core.balanced import balanced_kmeans
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, probed
from actsparse.errors import PlanError
from actsparse.methods.experts import Experts, PositiveSum
from actsparse.methods.gates import PrefillGate, TokenGate
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import SiteKind

SIZE = 6
ROUTERS = ("centroid", "mlp", "oracle")


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=loaded.record.gated)[0]


def values(loaded: LoadedModel, ids: Tensor, kind: SiteKind) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    with tapped(loaded.sites, {kind: lambda site, x: seen.update({site.layer: x[0]})}), torch.no_grad():
        loaded.model(input_ids=ids)
    return seen


def naive_scores(router: str, plan: Plan, layer: int, x: Tensor, a: Tensor) -> list[float]:
    """The scores of experts at one token."""
    experts = plan.fit.tensors[f"layers.{layer}.experts"].tolist()
    groups = [[i for i, g in enumerate(experts) if g == e] for e in range(FFN // SIZE)]
    if router == "oracle":
        return [sum(max(0.0, float(a[i])) for i in group) for group in groups]
    if router == "mlp":
        first, second = (plan.fit.tensors[f"layers.{layer}.router.{part}"] for part in ("first", "second"))
        return (second @ torch.tanh(first @ x)).tolist()
    centroids = plan.fit.tensors[f"layers.{layer}.centroids"]
    return [float(F.cosine_similarity(x, centroid, dim=0)) for centroid in centroids]


@pytest.mark.parametrize("router", ROUTERS)
def test_each_token_keeps_its_best_experts(router: str, loaded: LoadedModel, calibration: TextCalibration) -> None:
    plan = fitted(f"moefication:neurons={SIZE},router={router},epochs=2@0.6", loaded, calibration)
    ids = token_ids(1, BLOCK, seed=2)
    inputs, neurons = values(loaded, ids, SiteKind.MLP_IN), values(loaded, ids, SiteKind.NEURON)
    for layer, gates in enumerate(plan.gates()):
        gate = gates.neurons
        assert isinstance(gate, TokenGate)
        assert gate.ideal == (router == "oracle")
        experts = plan.fit.tensors[f"layers.{layer}.experts"].tolist()
        for place in range(PROMPT, PROMPT + 5):
            scores = naive_scores(router, plan, layer, inputs[layer][place], neurons[layer][place])
            best = sorted(range(FFN // SIZE), key=lambda e: -scores[e])[:4]  # 19 neurons asked for: four whole experts
            read = neurons if router == "oracle" else inputs
            mask = gate.rule.keep(read[layer][place][None])[0]
            assert mask.nonzero().squeeze(1).tolist() == [i for i in range(FFN) if experts[i] in best]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_sequence_keeps_the_experts_of_the_mean_prompt_score(
    router: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"moefication:neurons={SIZE},routing=sequence,router={router},epochs=2@0.5", loaded, calibration)
    ids = token_ids(1, BLOCK, seed=3)
    inputs, neurons = values(loaded, ids, SiteKind.MLP_IN), values(loaded, ids, SiteKind.NEURON)
    probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
    with probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=ids)
    for layer, gates in enumerate(plan.gates()):
        assert isinstance(gates.neurons, PrefillGate)
        assert gates.mlp_extra_bytes == 0
        totals = [0.0] * (FFN // SIZE)
        for place in range(SINK, PROMPT):
            scores = naive_scores(router, plan, layer, inputs[layer][place], neurons[layer][place])
            totals = [total + score for total, score in zip(totals, scores, strict=True)]
        best = sorted(range(FFN // SIZE), key=lambda e: -totals[e])[:4]
        experts = plan.fit.tensors[f"layers.{layer}.experts"].tolist()
        state = probe.state.neurons[layer]
        assert state is not None
        assert state.chosen()[0].nonzero().squeeze(1).tolist() == [i for i in range(FFN) if experts[i] in best]
    assert probe.kept_frac() == [0.5] * LAYERS


def test_experts_are_balanced_clusters_of_normalised_gate_rows(
    loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted(f"moefication:neurons={SIZE},seed=3@0.5", loaded, calibration)
    for layer, sites in enumerate(loaded.sites.layers):
        rows = sites.mlp_weights().gate.detach()
        naive, _ = balanced_kmeans(rows / rows.norm(dim=1, keepdim=True), [SIZE] * (FFN // SIZE), 3)
        assert plan.fit.tensors[f"layers.{layer}.experts"].tolist() == naive.tolist()


def test_a_plain_ffn_is_clustered_by_its_first_matrix(tiny_loaded, blocks: Sequences) -> None:
    opt = tiny_loaded("opt")
    plan = fitted(f"moefication:neurons={SIZE}@0.5", opt, of_blocks(opt, blocks, PROMPT, Silent()))
    rows = opt.sites.layers[1].mlp_weights().up.detach()
    naive, _ = balanced_kmeans(rows / rows.norm(dim=1, keepdim=True), [SIZE] * (FFN // SIZE), 0)
    assert plan.fit.tensors["layers.1.experts"].tolist() == naive.tolist()


def test_a_smaller_last_expert_is_counted_when_it_is_chosen() -> None:
    expert_of = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    rule = Experts(PositiveSum(expert_of, 3), expert_of, torch.tensor([3, 3, 2]), count=4)
    a = torch.zeros(2, 8)
    a[0, 6:], a[0, 0] = 5.0, 1.0  # experts 2 and 0: 2 + 3 neurons reach 4
    a[1, 3:6], a[1, 7] = 5.0, 1.0  # experts 1 and 2: 3 + 2
    assert rule.keep(a).int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]
    exact = Experts(rule.scores, expert_of, rule.sizes, count=2)
    assert exact.keep(a).sum(dim=-1).tolist() == [2, 3]


def test_what_a_smaller_last_expert_makes_uncertain_is_not_called_realised(
    loaded: LoadedModel, calibration: TextCalibration
) -> None:
    plan = fitted("moefication:neurons=7@0.5", loaded, calibration)
    sizes = plan.fit.tensors["layers.0.experts"].bincount().tolist()
    assert sizes == [7] * 6 + [6]
    assert plan.realised is None
    assert plan.predicted.neuron_frac == pytest.approx(1 - 28 / 48)


def test_scores_may_count_what_is_negative_too() -> None:
    expert_of = torch.tensor([0, 0, 1, 1])
    a = torch.tensor([[1.0, 1.0, -9.0, 0.5]])
    assert PositiveSum(expert_of, 2)(a).tolist() == [[2.0, 0.5]]
    assert PositiveSum(expert_of, 2, magnitude=True)(a).tolist() == [[2.0, 9.5]]


def test_a_trained_router_learns_its_experts(loaded: LoadedModel, calibration: TextCalibration) -> None:
    options = f"neurons={SIZE},router=mlp"
    learnt = fitted(f"moefication:{options},epochs=60,batch=16,rate=0.01,patience=10@0.5", loaded, calibration)
    drawn = fitted(f"moefication:{options},epochs=1,rate=1e-12@0.5", loaded, calibration)
    for one, other in zip(learnt.fit.layers, drawn.fit.layers, strict=True):
        assert one.recall > other.recall + 0.03
        assert one.recall_corrected == pytest.approx((one.recall - 0.5) / 0.5)


@pytest.mark.parametrize(("router", "numbers"), [("centroid", 8 * HIDDEN), ("mlp", 8 * HIDDEN + 64), ("oracle", 0)])
def test_what_a_router_reads_counts(router: str, numbers: int, loaded: LoadedModel, calibration) -> None:
    plan = fitted(f"moefication:neurons={SIZE},router={router},epochs=1@0.5", loaded, calibration)
    assert [gate.mlp_extra_bytes for gate in plan.gates()] == [4 * numbers] * LAYERS


@pytest.mark.parametrize(("options", "what"), [
    ("neurons=0", "neurons must be at least 1"), ("router=center", "router cannot be 'center'"),
    ("refresh_every=4", "does not go with routing=token"), ("routing=prompt", "routing cannot be 'prompt'"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: str, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        parse(f"moefication:{options}@0.5")


def test_experts_as_large_as_the_layer_are_refused(loaded: LoadedModel, calibration: TextCalibration) -> None:
    with pytest.raises(PlanError, match="experts of 48 neurons leave nothing to choose from 48"):
        fitted("moefication:neurons=48@0.5", loaded, calibration)
