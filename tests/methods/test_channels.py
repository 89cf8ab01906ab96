"""TEAL, WINA, R-Sparse and LaRoSA against naive versions on activations that were collected by hand."""

from collections.abc import Callable
from math import floor

import pytest
import torch
from hooked import inputs_of, weight_of
from lengths import BLOCK, PROMPT, SINK
from tiny import LAYERS
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.errors import PlanError
from actsparse.methods.gates import Threshold, TopK
from actsparse.methods.larosa import principal_axes
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.rsparse import low_rank
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import Unit

FUSED = ["phi3", "gpt2", "falcon"]


def fitted(text: str, loaded: LoadedModel, calibration: TextCalibration) -> Plan:
    return fit_plan(parse(text), calibration, loaded.record.step, gated=loaded.record.gated)[0]


@pytest.fixture(scope="module", params=["llama", *FUSED])
def family(request: pytest.FixtureRequest, tiny_loaded: Callable, blocks: Sequences) -> tuple:
    loaded = tiny_loaded(request.param)
    return loaded, of_blocks(loaded, blocks, PROMPT, Silent()), inputs_of(loaded, blocks)


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.7])
def test_teal_thresholds_are_the_order_statistic_of_all_inputs(family: tuple, drop: float) -> None:
    loaded, calibration, inputs = family
    plan = fitted(f"teal@{drop}", loaded, calibration)
    assert {(one.layer, one.unit) for one in plan.fit.layers} == set(inputs)
    for entry, realised in zip(plan.fit.layers, plan.fit.realised_drop, strict=True):
        values = inputs[entry.layer, entry.unit].abs().flatten().sort().values
        assert entry.threshold == float(values[floor(drop * len(values) + 1e-9)])
        assert realised == pytest.approx(float((values < entry.threshold).double().mean()), abs=1e-12)


@pytest.mark.parametrize("drop", [0.3, 0.6])
def test_wina_thresholds_weigh_channels_by_their_column(family: tuple, drop: float) -> None:
    loaded, calibration, inputs = family
    plan = fitted(f"wina:mode=threshold@{drop}", loaded, calibration)
    for entry in plan.fit.layers:
        norms = weight_of(loaded, entry.layer, entry.unit).norm(dim=0)
        values = (inputs[entry.layer, entry.unit].abs() * norms).flatten().sort().values
        assert entry.threshold == pytest.approx(float(values[floor(drop * len(values) + 1e-9)]), rel=1e-5)


@pytest.mark.parametrize("name", ["teal:mode=topk", "wina"])
def test_top_k_keeps_exactly_k_of_the_largest_scores(family: tuple, name: str) -> None:
    loaded, calibration, inputs = family
    plan = fitted(f"{name}@0.6", loaded, calibration)
    for layer, gates in enumerate(plan.gates()):
        for unit, rule in gates.rules.items():
            x = inputs[layer, unit]
            weights = weight_of(loaded, layer, unit).norm(dim=0) if name == "wina" else torch.ones(x.shape[1])
            k = max(1, floor(0.4 * x.shape[1] + 0.5))
            assert isinstance(rule.rule, TopK)
            mask = rule.rule.keep(x)
            assert (mask.sum(dim=1) == k).all()
            for row, kept in zip(x[:20], mask[:20], strict=True):
                scores = row.abs() * weights
                assert set(kept.nonzero().squeeze(1).tolist()) == set(scores.topk(k).indices.tolist())


def test_fused_projections_share_one_threshold(tiny_loaded: Callable, blocks: Sequences) -> None:
    for name, fused in (("phi3", {Unit.QKV, Unit.GATE_UP}), ("gpt2", {Unit.QKV}), ("falcon", {Unit.QKV})):
        loaded = tiny_loaded(name)
        plan = fitted("teal@0.5", loaded, of_blocks(loaded, blocks, PROMPT, Silent()))
        units = {one.unit for one in plan.fit.layers}
        assert fused <= units
        assert not units & {Unit.Q, Unit.K, Unit.V}
        assert len(plan.fit.layers) == LAYERS * len(units)
        assert plan.predicted.channel_frac == pytest.approx(0.5)
        assert plan.predicted.mlp_bytes_frac == pytest.approx(0.5)


def test_inputs_that_are_the_same_have_the_same_threshold(loaded: LoadedModel, calibration: TextCalibration) -> None:
    fit = fitted("teal@0.5", loaded, calibration).fit
    for layer in range(LAYERS):
        assert len({fit.of(layer, unit).threshold for unit in (Unit.Q, Unit.K, Unit.V)}) == 1
        assert fit.of(layer, Unit.GATE).threshold == fit.of(layer, Unit.UP).threshold


def test_rsparse_passes_what_it_drops_through_the_low_rank_part(
    loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    plan = fitted("rsparse:rank_frac=0.2@0.6", loaded, calibration)
    wina = fitted("wina@0.6", loaded, calibration)
    probes = [MaskedPlan(one.gates(), prompt_length=SINK, sink_tokens=SINK) for one in (plan, wina)]
    with probed(loaded.sites, probes), torch.no_grad():
        loaded.model(input_ids=blocks.ids[0][None], use_cache=False)
    inputs = inputs_of(loaded, Sequences(blocks.ids[:1], blocks.record))
    for layer in range(LAYERS):
        for unit in loaded.sites.layers[layer].projections:
            weight, x = weight_of(loaded, layer, unit), inputs[layer, unit]
            rank = max(1, floor(0.2 * min(weight.shape) + 0.5))
            u, s, vh = torch.linalg.svd(weight.double())
            part = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
            scores = x.abs() * weight.norm(dim=0)
            k = max(1, floor(0.4 * x.shape[1] + 0.5))
            kept = torch.zeros_like(x).scatter(1, scores.topk(k).indices, 1.0)
            dense = x.double() @ weight.double().T
            sparse = (x * kept).double() @ weight.double().T + (x * (1 - kept)).double() @ part.T
            naive = ((dense - sparse).norm(dim=1) / dense.norm(dim=1)).mean()
            assert probes[0].tally(unit, layer).mean_error == pytest.approx(float(naive), rel=1e-4)
            assert probes[0].tally(unit, layer).mean_error < probes[1].tally(unit, layer).mean_error
    extra = sum(layer.extra_bytes for layer in plan.gates())
    sizes = [
        max(1, floor(0.2 * min(w.shape) + 0.5)) * sum(w.shape) * 4
        for layer in range(LAYERS)
        for w in (weight_of(loaded, layer, unit) for unit in loaded.sites.layers[layer].projections)
    ]
    assert extra == sum(sizes)
    lost = (wina.predicted.model_bytes_frac - plan.predicted.model_bytes_frac) * loaded.record.step.total
    assert lost == pytest.approx(extra)


def test_low_rank_of_a_large_weight_is_found_by_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(60, 8, generator=generator) @ torch.randn(8, 50, generator=generator)
    weight += 0.01 * torch.randn(60, 50, generator=generator)
    exact = low_rank(weight, 0.16)
    monkeypatch.setattr("actsparse.methods.rsparse.EXACT_SVD", 10)
    state = torch.random.get_rng_state()
    found = low_rank(weight, 0.16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found[0].shape == exact[0].shape == (60, 8)
    torch.testing.assert_close(found[0] @ found[1].T, exact[0] @ exact[1].T, atol=1e-3, rtol=1e-3)


def test_larosa_ranks_principal_components(
    loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    plan = fitted("larosa@0.5", loaded, calibration)
    inputs = inputs_of(loaded, blocks)
    for layer, gates in enumerate(plan.gates()):
        for unit, rule in gates.rules.items():
            x = inputs[layer, unit]
            if unit in (Unit.O, Unit.DOWN):
                assert rule.basis is None
                continue
            values, axes = torch.linalg.eigh(x.double().T @ x.double() / len(x))
            assert rule.basis is not None
            # columns are eigenvectors, the largest first; signs are free
            aligned = (axes.flip(-1).T @ rule.basis.double()).abs()
            gaps = (values[1:] - values[:-1]).flip(0)
            assert float(aligned.diagonal()[:3].min()) > 0.99 or float(gaps[:3].min()) < 1e-3
            torch.testing.assert_close(rule.basis.T @ rule.basis, torch.eye(x.shape[1]), atol=1e-5, rtol=0)
    gates = plan.gates()[0]
    hidden = loaded.record.hidden_size
    assert gates.attention_extra_bytes == gates.mlp_extra_bytes == hidden * hidden * 4
    probe = MaskedPlan(plan.gates(), prompt_length=SINK, sink_tokens=SINK)
    with probed(loaded.sites, [probe]), torch.no_grad():
        loaded.model(input_ids=blocks.ids[0][None], use_cache=False)
    for layer in range(LAYERS):
        basis = plan.gates()[layer].rules[Unit.Q].basis
        assert basis is not None
        x, weight = inputs[layer, Unit.Q][: BLOCK - SINK], weight_of(loaded, layer, Unit.Q)
        rotated = x @ basis
        kept = torch.zeros_like(x).scatter(1, rotated.abs().topk(x.shape[1] // 2).indices, 1.0)
        naive = (((rotated * (1 - kept)) @ basis.T @ weight.T).norm(dim=1) / (x @ weight.T).norm(dim=1)).mean()
        assert probe.tally(Unit.Q, layer).mean_error == pytest.approx(float(naive), rel=1e-3)


def test_principal_axes_do_not_depend_on_the_sign_that_the_solver_returns() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.arange(1.0, 7.0)
    axes = principal_axes(x.T @ x)
    assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()
    variances = (x @ axes).square().sum(dim=0)
    assert (variances[:-1] >= variances[1:]).all()


@pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
@pytest.mark.parametrize("name", ["teal", "wina"])
def test_an_allocation_keeps_the_budget_and_lowers_the_error_of_layers(
    name: str, allocation: str, loaded: LoadedModel, calibration: TextCalibration
) -> None:
    uniform = fitted(f"{name}@0.5", loaded, calibration)
    plan = fitted(f"{name}:allocation={allocation}@0.5", loaded, calibration)
    assert plan.predicted.channel_frac == pytest.approx(0.5, abs=0.01)
    assert plan.fit.predicted_drop != uniform.fit.predicted_drop
    replay = calibration.channels()
    errors = [
        sum(replay.block_error(layer, gates) ** 2 for layer, gates in enumerate(one.gates())) for one in (plan, uniform)
    ]
    assert errors[0] < errors[1]
    if allocation == "greedy":
        sizes = replay.sizes
        for layer in range(LAYERS):
            dropped = sum(
                share * sizes[one.unit]
                for one, share in zip(plan.fit.layers, plan.fit.predicted_drop, strict=True)
                if one.layer == layer
            )
            assert dropped / sum(sizes.values()) == pytest.approx(0.5, abs=0.02)


def test_a_layer_under_gates_has_the_error_of_a_naive_layer(
    loaded: LoadedModel, calibration: TextCalibration, blocks: Sequences
) -> None:
    plan = fitted("teal@0.5", loaded, calibration)
    replay = calibration.channels()
    prompt = min(48, BLOCK // 2)
    outputs: dict[str, list[Tensor]] = {"dense": [], "sparse": []}
    for which in outputs:
        run = MaskedPlan(plan.gates(), prompt_length=prompt, sink_tokens=SINK)
        for block in blocks.stack()[:2]:
            seen: list[Tensor] = []
            handle = loaded.model.model.layers[0].register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(out if isinstance(out, Tensor) else out[0])
            )
            with torch.no_grad():
                if which == "dense":
                    loaded.model(input_ids=block[None], use_cache=False)
                else:
                    run = MaskedPlan(plan.gates(), prompt_length=prompt, sink_tokens=SINK)
                    with masked(loaded.sites, run):
                        loaded.model(input_ids=block[None], use_cache=False)
            handle.remove()
            outputs[which].append(seen[0][0, prompt:])
    dense, sparse = (torch.cat(outputs[which]) for which in ("dense", "sparse"))
    naive = ((dense - sparse).norm(dim=1) / dense.norm(dim=1)).mean()
    assert replay.block_error(0, plan.gates()[0]) == pytest.approx(float(naive), rel=1e-5)
    before = list(loaded.model.model.layers)
    assert not any(block._forward_hooks for block in before)


def test_rules_are_data_that_an_engine_can_read(loaded: LoadedModel, calibration: TextCalibration) -> None:
    teal, wina = (fitted(text, loaded, calibration).gates()[0].rules for text in ("teal@0.5", "wina@0.5"))
    assert all(isinstance(rule.rule, Threshold) and isinstance(rule.rule.values, float) for rule in teal.values())
    assert all(isinstance(rule.rule, TopK) and rule.rule.weights is not None for rule in wina.values())


@pytest.mark.parametrize("text", ["rsparse:rank_frac=0@0.5", "rsparse:rank_frac=0.9@0.5"])
def test_a_rank_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="rank_frac must be"):
        parse(text)
