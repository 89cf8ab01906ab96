"""compensate, protect and refresh_every: what they do to masks and outputs, in every kind of method."""

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from tiny import FFN, LAYERS, token_ids
from torch import Tensor

from actsparse.core.masks import kept_count
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import PlanError
from actsparse.methods.plan import Plan, fit_plan, from_record, to_record
from actsparse.methods.short import parse
from actsparse.models.taps import tapped
from actsparse.results import SiteKind

KINDS = ("static@0.5", "random:seed=1@0.5", "griffin@0.5", "tda@0.5", "cats@0.5", "oracle-n@0.5", "dejavu:epochs=1@0.5",
         "moefication:neurons=6,routing=sequence@0.5")  # fmt: skip


def fitted(text: str, loaded, calibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]


def with_option(text: str, option: str) -> str:
    head, _, share = text.partition("@")
    return f"{head}{',' if ':' in head else ':'}{option}@{share}"


def masked_neurons(plan: Plan, loaded, ids: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Layer 0's neurons under a plan and dense, by layer (only layer 0 has equal inputs in both)."""
    sparse, dense = {}, {}
    with torch.no_grad():
        with tapped(loaded.sites, {SiteKind.NEURON: lambda s, a: dense.update({s.layer: a[0]})}):
            loaded.model(input_ids=ids)
        run = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
        note = {SiteKind.NEURON: lambda s, a: sparse.update({s.layer: a[0]})}
        with masked(loaded.sites, run), tapped(loaded.sites, note):
            loaded.model(input_ids=ids)
    return sparse, dense


@pytest.mark.parametrize("text", KINDS)
def test_dropped_neurons_take_their_calibration_mean(text, loaded, calibration, dense) -> None:
    ids = token_ids(1, BLOCK, seed=4)
    plain, plan = fitted(text, loaded, calibration), fitted(with_option(text, "compensate=true"), loaded, calibration)
    without, whole = masked_neurons(plain, loaded, ids)
    found, _ = masked_neurons(plan, loaded, ids)
    mean = dense(SiteKind.NEURON, 0).flatten(0, 1).mean(dim=0).float()
    dropped = (without[0] == 0) & (whole[0] != 0)
    assert int(dropped[PROMPT:].sum()) > 0
    assert not bool(dropped[:PROMPT].any())
    torch.testing.assert_close(found[0], torch.where(dropped, mean, whole[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", KINDS)
def test_protected_neurons_are_always_kept_beside_the_methods_own(text, loaded, calibration, dense, norms) -> None:
    plain, plan = fitted(text, loaded, calibration), fitted(with_option(text, "protect=0.25"), loaded, calibration)
    ids = token_ids(1, BLOCK, seed=4)
    probes = [MaskedPlan(one.gates(), prompt_length=PROMPT, sink_tokens=SINK) for one in (plain, plan)]
    with probed(loaded.sites, probes), torch.no_grad():
        loaded.model(input_ids=ids)
    scores = dense(SiteKind.NEURON, 0).abs().flatten(0, 1).mean(dim=0) * norms[0]
    hot = sorted(scores.topk(kept_count(0.25, FFN)).indices.tolist())
    sparse, whole = masked_neurons(plan, loaded, ids)
    own, _ = masked_neurons(plain, loaded, ids)
    assert torch.equal(sparse[0][PROMPT:, hot], whole[0][PROMPT:, hot])
    others = [i for i in range(FFN) if i not in hot]
    assert torch.equal(sparse[0][PROMPT:, others], own[0][PROMPT:, others])
    assert probes[1].kept_frac()[0] >= probes[0].kept_frac()[0]


def test_what_protection_adds_to_a_fixed_mask_is_predicted(loaded, calibration) -> None:
    plan = fitted("random:seed=1,protect=0.5@0.5", loaded, calibration)
    kept = [int(gate.neurons.mask.sum()) for gate in plan.gates()]
    assert plan.predicted.neuron_frac == pytest.approx(1 - sum(kept) / (LAYERS * FFN))
    assert plan.predicted == plan.realised
    assert [one.kept for one in plan.fit.layers] == kept
    assert fitted("griffin:protect=0.5@0.5", loaded, calibration).realised is None


@pytest.mark.parametrize("text", KINDS)
def test_add_ons_go_through_a_plans_record(text, loaded, calibration) -> None:
    plan = fitted(with_option(text, "protect=0.2,compensate=true"), loaded, calibration)
    record = to_record(plan, loaded.record, None)
    assert record.options["protect"] == 0.2
    assert record.options["compensate"] is True
    again = from_record(record, plan.fit.tensors, "runs/p")
    assert (again.method, again.add_ons) == (plan.method, plan.add_ons)


@pytest.mark.parametrize("source", ["gate", "up"])
def test_prompt_methods_read_gate_or_up(source, loaded, calibration, dense) -> None:
    kind = SiteKind.GATE if source == "gate" else SiteKind.UP
    plan = fitted(f"griffin:source={source}@0.5", loaded, calibration)
    ids = token_ids(1, BLOCK, seed=6)
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        with tapped(loaded.sites, {kind: lambda s, x: seen.update({s.layer: x[0]})}):
            loaded.model(input_ids=ids)
        probe = MaskedPlan(plan.gates(), prompt_length=PROMPT, sink_tokens=SINK)
        with probed(loaded.sites, [probe]):
            loaded.model(input_ids=ids)
    for layer in range(LAYERS):
        rows = seen[layer][SINK:PROMPT].double()
        naive = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(dim=0).topk(FFN // 2).indices
        state = probe.state.neurons[layer]
        assert state.chosen()[0].nonzero().squeeze(1).tolist() == sorted(naive.tolist())


@pytest.mark.parametrize("name", ["griffin", "tda"])
def test_up_needs_a_gated_ffn(name) -> None:
    with pytest.raises(PlanError, match=f"{name}: source=up needs a gated FFN"):
        parse(f"{name}:source=up@0.5").method.check(gated=False)
    parse(f"{name}:source=gate@0.5").method.check(gated=False)


@pytest.mark.parametrize("text", ["griffin:refresh_every=5@0.5", "coreinfer:refresh_every=5@0.5",
                                  "moefication:neurons=6,routing=sequence,refresh_every=5@0.5"])  # fmt: skip
def test_every_fifth_token_runs_dense_and_joins_the_statistic(text, loaded, calibration) -> None:
    plan = fitted(text, loaded, calibration)
    ids = token_ids(1, BLOCK, seed=7)
    sparse, dense = masked_neurons(plan, loaded, ids)
    whole = [bool((sparse[0][t] == dense[0][t]).all()) for t in range(PROMPT, BLOCK)]
    assert whole == [(t + 1) % 5 == 0 for t in range(BLOCK - PROMPT)]
    longer = fitted(text.replace("refresh_every=5", "refresh_every=0"), loaded, calibration)
    probe = MaskedPlan(longer.gates(), prompt_length=PROMPT, sink_tokens=SINK)
    with probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=ids)
    first = probe.state.neurons[0].chosen()[0]
    assert torch.equal(sparse[0][PROMPT] != 0, first & (dense[0][PROMPT] != 0))


def test_a_refreshed_mask_is_that_of_prompt_and_refreshed_tokens(loaded, calibration) -> None:
    sparse, dense = masked_neurons(fitted("griffin:refresh_every=5@0.5", loaded, calibration), loaded, token_ids(1, 40))
    for last in range(PROMPT, BLOCK):
        refreshed = [t for t in range(PROMPT, last + 1) if (t - PROMPT + 1) % 5 == 0]
        if last in refreshed:
            continue
        rows = dense[0][[*range(SINK, PROMPT), *refreshed]].double()
        naive = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(dim=0).topk(FFN // 2).indices
        assert sparse[0][last].nonzero().squeeze(1).tolist() == sorted(naive.tolist())


@pytest.mark.parametrize(("text", "what", "hint"), [
    ("griffin:protect=1.5@0.5", "protect must be at least 0 and below 1", "protect=0.1"),
    ("griffin:compensate=yes@0.5", "compensate cannot be 'yes'", "true or false"),
    ("griffin:compensat=true@0.5", "no option 'compensat'", "did you mean 'compensate'?"),
    ("cats:protekt=0.1@0.5", "no option 'protekt'", "did you mean 'protect'?"),
])  # fmt: skip
def test_add_ons_that_do_not_fit_are_refused(text, what, hint) -> None:
    with pytest.raises(PlanError) as caught:
        parse(text)
    assert what in caught.value.what
    assert hint in caught.value.hint
