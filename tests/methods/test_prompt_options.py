"""`source`, `first` and `length_aware` of the methods that read the prompt statistic."""

from math import log, sqrt

import pytest
import torch
from lengths import PROMPT, SINK
from tiny import FFN, LAYERS
from torch import Tensor

from actsparse.engine.gating import GateState
from actsparse.errors import PlanError
from actsparse.methods.length_aware import fitting_lengths, threshold_at
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.methods.tda import over
from actsparse.results import SiteKind

OPTIONS = {"first=5": ("a", 5), "source=n": ("n", 0), "source=n,first=3": ("n", 3), "first=999": ("a", 0)}
every_option = pytest.mark.parametrize("options", OPTIONS)


def naive_statistic(rows: Tensor) -> Tensor:
    return torch.stack([(row / row.norm()) ** 2 for row in rows]).mean(dim=0).sqrt()


def chosen(plan: Plan, layer: int, block: Tensor, prompt: int) -> Tensor:
    """The mask after a prompt that arrives in two pieces."""
    state = GateState(plan.gates()[layer].neurons, prompt_length=prompt, sink_tokens=SINK)
    padded = torch.cat([torch.full((1, SINK, FFN), 7.0), block[None].float()], dim=1)
    state.observe(padded[:, :9], 0)
    state.observe(padded[:, 9:], 9)
    return state.chosen()[0]


@every_option
def test_griffin_reads_what_was_asked_for(options, loaded, calibration, dense, norms) -> None:
    plan = fit_plan(parse(f"griffin:{options}@0.5"), calibration, loaded.record.step, gated=True)[0]
    source, first = OPTIONS[options]
    for layer in range(LAYERS):
        for block in dense(SiteKind.NEURON, layer)[:3]:
            rows = block[: PROMPT - SINK][: first or None]
            s = naive_statistic(rows * norms[layer] if source == "n" else rows)
            kept = sorted(s.topk(FFN // 2).indices.tolist())
            assert chosen(plan, layer, block, PROMPT).nonzero().squeeze(1).tolist() == kept


@every_option
def test_tda_is_fitted_on_what_it_reads(options, loaded, calibration, dense, norms) -> None:
    plan = fit_plan(parse(f"tda:{options}@0.4"), calibration, loaded.record.step, gated=True)[0]
    source, first = OPTIONS[options]
    for layer in range(LAYERS):
        scores = []
        for block in dense(SiteKind.NEURON, layer):
            rows = block[: PROMPT - SINK][: first or None]
            scores.append(naive_statistic(rows * norms[layer] if source == "n" else rows) * sqrt(FFN))
        pooled = sorted(torch.cat(scores).tolist(), reverse=True)
        threshold = pooled[int(0.6 * len(pooled) + 0.5) - 1]
        assert plan.fit.layers[layer].threshold == pytest.approx(threshold, rel=1e-5)
        kept = sum(int(chosen(plan, layer, one, PROMPT).sum()) for one in dense(SiteKind.NEURON, layer))
        assert kept == pytest.approx(int(0.6 * len(pooled) + 0.5), abs=1)


@pytest.mark.parametrize("options", ["first=2", "source=n"])
def test_options_change_masks(options, loaded, calibration, dense) -> None:
    plain, changed = (
        fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0]
        for text in ("griffin@0.5", f"griffin:{options}@0.5")
    )
    blocks = dense(SiteKind.NEURON, 0)
    pairs = [(chosen(plain, 0, block, PROMPT), chosen(changed, 0, block, PROMPT)) for block in blocks]
    assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["griffin", "tda"])
def test_options_that_do_not_fit_are_refused(name) -> None:
    with pytest.raises(PlanError, match=f"{name}: first must be at least 0, not -1"):
        parse(f"{name}:first=-1@0.5")
    with pytest.raises(PlanError, match=f"{name}: source cannot be 'gates'"):
        parse(f"{name}:source=gates@0.5")
    with pytest.raises(PlanError, match=f"{name}: refresh_every must be at least 0, not -4"):
        parse(f"{name}:refresh_every=-4@0.5")
    with pytest.raises(PlanError, match="reads the prompt's beginning alone"):
        parse(f"{name}:first=3,refresh_every=4@0.5")


def test_lengths_to_fit_at() -> None:
    assert fitting_lengths(252, 508) == [16, 32, 64, 128, 252, 256, 508]
    assert fitting_lengths(64, 64) == [16, 32, 64]
    assert fitting_lengths(12, 36) == [12, 16, 32, 36]
    assert fitting_lengths(5, 5) == [5]


def test_thresholds_between_lengths_are_linear_in_the_logarithm() -> None:
    lengths, thresholds = [16, 64, 256], [1.0, 0.6, 0.5]
    assert [threshold_at(n, lengths, thresholds) for n in (1, 16, 64, 256, 999)] == [1.0, 1.0, 0.6, 0.5, 0.5]
    assert threshold_at(32, lengths, thresholds) == pytest.approx(0.8)
    weight = (log(200) - log(64)) / (log(256) - log(64))
    assert threshold_at(200, lengths, thresholds) == pytest.approx(0.6 - 0.1 * weight)


def test_a_length_aware_threshold_keeps_its_share_at_every_fitted_length(loaded, calibration, dense) -> None:
    aware, plain = (
        fit_plan(parse(f"{name}@0.5"), calibration, loaded.record.step, gated=True)[0]
        for name in ("tda:length_aware=true", "tda")
    )
    lengths = aware.fit.tensors["lengths"].tolist()
    assert lengths == [12, 16, 32, 36]
    drift = {"aware": 0.0, "plain": 0.0}
    for layer in range(LAYERS):
        blocks = dense(SiteKind.NEURON, layer)
        for tokens in lengths:
            for name, plan in (("aware", aware), ("plain", plain)):
                kept = sum(int(chosen(plan, layer, one, SINK + tokens).sum()) for one in blocks) / blocks[:, 0].numel()
                drift[name] = max(drift[name], abs(kept - 0.5))
        assert aware.fit.layers[layer] == plain.fit.layers[layer]
    assert drift["aware"] <= 2 / FFN
    assert drift["plain"] > drift["aware"]


def test_a_length_aware_error_target_is_met_at_shorter_prompts_too(loaded, calibration) -> None:
    plan = fit_plan(parse("tda:length_aware=true,target_error=0.3"), calibration, loaded.record.step, gated=True)[0]
    assert plan.fit.tensors["lengths"].tolist() == [PROMPT - SINK]
    replay = calibration.prompts()
    for layer in range(LAYERS):
        scores = replay.statistics(layer) * sqrt(FFN)
        threshold = float(plan.fit.tensors["length_thresholds"][layer, 0])
        assert replay.mask_error(layer, over(scores, threshold)) <= 0.3
