"""Recall, regret and HU3 of routers against loops over tokens, and what must hold of any series."""

import pytest
import torch
from tiny import FFN, LAYERS, make_tokenizer, words
from torch import Tensor

from actsparse.data.sequences import Sequences, blocks_of
from actsparse.methods.gates import TokenGate
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.router_study import ORACLE, PREVIOUS, STATIC, fit_series, predictability_gap, score_series
from actsparse.results import SiteKind

PROMPT, BLOCK, SINK, DENSITY = 12, 32, 4, 0.25
KEPT = FFN // 4


def blocks(seed: int, count: int = 300) -> Sequences:
    return blocks_of(
        words(count, seed=seed), make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="quality"
    )


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def series(loaded):
    calibration = of_blocks(loaded, blocks(3), PROMPT, Silent())
    return fit_series(loaded, calibration, DENSITY, options="epochs=30,batch=16,rate=0.01")


@pytest.fixture(scope="module")
def scores(loaded, series):
    return score_series(loaded, series, blocks(5), DENSITY, PROMPT, Silent())


def test_numbers_against_a_loop_over_tokens(loaded, series, scores) -> None:
    block = blocks(5).ids[1]
    seen: dict[tuple[SiteKind, int], Tensor] = {}
    kinds = (SiteKind.NEURON, SiteKind.MLP_IN)
    with tapped(loaded.sites, {k: lambda s, x: seen.update({(s.kind, s.layer): x[0]}) for k in kinds}), torch.no_grad():
        loaded.model(input_ids=block[None, :-1])
    for layer in range(LAYERS):
        a, x = seen[SiteKind.NEURON, layer].double(), seen[SiteKind.MLP_IN, layer]
        down = loaded.sites.layers[layer].down.weight.detach().double()
        gate = series["sequential"][layer].neurons
        assert isinstance(gate, TokenGate)
        recalls: dict[str, list[float]] = {"sequential": [], PREVIOUS: []}
        errors: dict[str, list[float]] = {"sequential": [], PREVIOUS: [], ORACLE: []}
        top = [set(sorted(range(FFN), key=lambda i: -float(row[i].abs() * down[:, i].norm()))[:KEPT]) for row in a]
        for t in range(PROMPT, BLOCK - 1):
            router = set(gate.rule.keep(x[t][None])[0].nonzero().squeeze(1).tolist())
            for name, mask in (("sequential", router), (PREVIOUS, top[t - 1]), (ORACLE, top[t])):
                dropped = torch.tensor([i not in mask for i in range(FFN)])
                errors[name].append(float((down @ (a[t] * dropped)).norm() / (down @ a[t]).norm()))
                if name in recalls:
                    recalls[name].append(len(mask & top[t]) / KEPT)
        for name in recalls:
            count = BLOCK - 1 - PROMPT
            assert float(scores[name].recall[layer, 1]) == pytest.approx(sum(recalls[name]) / count)
            regret = (sum(errors[name]) - sum(errors[ORACLE])) / count
            assert float(scores[name].regret[layer, 1]) == pytest.approx(regret, abs=1e-5)


def test_the_oracle_finds_all_and_regrets_nothing(scores) -> None:
    assert torch.all(scores[ORACLE].recall == 1)
    assert torch.all(scores[ORACLE].regret == 0)
    assert scores[ORACLE].corrected_recalls().mean.value == pytest.approx(1)


def test_series_have_intervals_and_lie_between_chance_and_the_oracle(scores) -> None:
    assert set(scores) == {"sequential", "parallel", "lookahead", STATIC, PREVIOUS, ORACLE}
    for one in scores.values():
        mean = one.recalls().mean
        assert mean.low <= mean.value <= mean.high
        assert one.corrected_recalls().mean.value == pytest.approx((mean.value - 0.25) / 0.75)
        assert one.regrets().mean.value > -0.05
    assert scores["sequential"].recalls().mean.value > 0.3


def test_layers_without_a_router_have_no_score(loaded) -> None:
    calibration = of_blocks(loaded, blocks(3), PROMPT, Silent())
    found = fit_series(loaded, calibration, DENSITY, options="epochs=1,layers=1", inputs=("parallel",))
    scores = score_series(loaded, found, blocks(5), DENSITY, PROMPT, Silent())
    assert scores["parallel"].recall[0].isnan().all()
    assert scores["parallel"].recall[1].isfinite().all()
    assert scores["parallel"].recalls().layers[0].value is None
    assert scores["parallel"].recalls().mean.value == pytest.approx(float(scores["parallel"].recall[1].mean()))


def test_the_gap_is_the_difference_of_the_domains(loaded, series) -> None:
    router, same = series["sequential"], blocks(5)
    gap = predictability_gap(loaded, router, same, blocks(6, count=150), DENSITY, PROMPT, Silent())
    assert gap.hu3.value == pytest.approx(gap.same.value - gap.other.value)
    assert gap.hu3.low <= gap.hu3.value <= gap.hu3.high
    itself = predictability_gap(loaded, router, same, same, DENSITY, PROMPT, Silent())
    assert itself.hu3.value == 0
    assert itself.shuffled.value != itself.same.value
