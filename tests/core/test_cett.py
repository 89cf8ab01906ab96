import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.cett import CURVE_SHARES, CURVE_TOKENS, CettLayer, CettSolution
from actsparse.core.native import library
from actsparse.core.tail_norms import Tail

HIDDEN, NEURONS, TOKENS = 24, 160, 200


@pytest.fixture(autouse=True, params=["walked", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to get the norms: the compiled walk over the neurons, and torch's products alone."""
    if request.param == "products":
        monkeypatch.setattr(Tail, "walked", property(lambda _tail: False))
    elif library("tail_norms.cpp") is None:
        pytest.skip("no compiler")
    return request.param


def layer_of(seed: int, tail: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a log-normal tail (wider with `tail`), and a down projection of uneven columns."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(TOKENS, NEURONS, generator=generator).mul(tail).exp()
    a = spread * torch.randn(TOKENS, NEURONS, generator=generator)
    down = torch.randn(HIDDEN, NEURONS, generator=generator) * torch.linspace(0.2, 2.0, NEURONS)
    return a, down


def naive_at(a: torch.Tensor, down: torch.Tensor, eps: float) -> tuple[float, float]:
    """Mean CETT and sparsity at a threshold, in float64 and token by token (methods.md, section 2)."""
    a, down = a.double(), down.double()
    norms, ratios, dropped = down.norm(dim=0), [], []
    for row in a:
        output = float((down @ row).norm())
        if output == 0:
            continue
        small = row.abs() * norms < eps
        ratios.append(float((down @ torch.where(small, row, 0.0)).norm()) / output)
        dropped.append(float(small.double().mean()))
    return sum(ratios) / len(ratios), sum(dropped) / len(dropped)


def naive_solve(a: torch.Tensor, down: torch.Tensor, target: float) -> float:
    """eps by the bisection of methods.md, section 2: lo = 0, hi = max score, 30 steps, eps = lo."""
    low, high = 0.0, float((a.double().abs() * down.double().norm(dim=0)).max())
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if naive_at(a, down, middle)[0] <= target else (low, middle)
    return low


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 5.0, 1e9])
def test_cett_and_sparsity_at_a_threshold_are_their_definitions(eps):
    a, down = layer_of(0)
    found, (cett, sparsity) = CettLayer.of(a, down).at(eps), naive_at(a, down, eps)
    assert found.cett == pytest.approx(cett, rel=1e-5, abs=1e-9)
    assert found.sparsity == pytest.approx(sparsity, abs=1e-4)
    assert found.tokens == TOKENS
    if eps == 1e9:
        assert (found.cett, found.sparsity) == (pytest.approx(1.0, rel=1e-5), 1.0)


@pytest.mark.parametrize("tail", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("target", [0.01, 0.1, 0.2, 0.6])
def test_solving_agrees_with_thirty_bisections(target, tail):
    a, down = layer_of(1, tail)
    eps = naive_solve(a, down, target)
    found = CettLayer.of(a, down).solve(target)
    assert found.eps == pytest.approx(eps, rel=1e-3)
    assert found.sparsity == pytest.approx(naive_at(a, down, eps)[1], abs=1e-3)
    assert found.cett <= target


def test_one_massive_activation_does_not_cost_the_solver_its_accuracy():
    a, down = layer_of(2)
    a[17, 3] = 1e5
    eps = naive_solve(a, down, 0.2)
    found = CettLayer.of(a, down).solve(0.2)
    assert found.eps == pytest.approx(eps, rel=1e-3)
    assert found.sparsity == pytest.approx(naive_at(a, down, eps)[1], abs=1e-3)


def test_a_bracket_changes_the_work_and_not_the_result():
    a, down = layer_of(3)
    layer = CettLayer.of(a, down)
    expected = layer.solve(0.2)
    for bracket in ((0.0, 1e-3 * expected.eps),
                    (0.9 * expected.eps, 1.1 * expected.eps), (1.5 * expected.eps, 2 * expected.eps),
                    (0.1 * expected.eps, 0.2 * expected.eps)):  # fmt: skip
        found = layer.solve(0.2, bracket)
        assert found.eps == pytest.approx(expected.eps, rel=1e-3)
        assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-3)


def test_the_solution_of_a_layer_agrees_with_the_definition_at_every_target():
    a, down = layer_of(4)
    found = CettSolution.of(CettLayer.of(a, down), (0.1, 0.2, 0.3))
    for target, point in found.targets.items():
        eps = naive_solve(a, down, target)
        assert point.eps == pytest.approx(eps, rel=1e-3)
        assert point.sparsity == pytest.approx(naive_at(a, down, eps)[1], abs=1e-3)
    assert found.targets[0.1].sparsity < found.targets[0.2].sparsity < found.targets[0.3].sparsity


@settings(deadline=None, derandomize=True, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_the_sweep_drops_the_shares_asked_for_and_rises(seed):
    a, down = layer_of(seed)
    points = CettLayer.of(a, down).sweep(CURVE_SHARES)
    assert [point.sparsity for point in points] == pytest.approx(list(CURVE_SHARES), abs=1e-3)
    for left, right in pairwise(points):
        assert left.eps <= right.eps
        assert left.sparsity <= right.sparsity
        assert left.cett <= right.cett + 0.005
    assert len(points) >= 32


def test_scaling_activations_scales_the_threshold_and_nothing_else():
    a, down = layer_of(5)
    once, scaled = CettLayer.of(a, down).solve(0.2), CettLayer.of(a * 64, down).solve(0.2)
    assert scaled.eps == pytest.approx(64 * once.eps, rel=1e-4)
    assert scaled.sparsity == pytest.approx(once.sparsity, abs=1e-4)


def test_tokens_without_output_are_skipped():
    a, down = layer_of(6)
    with_zeros = torch.cat([a[:50], torch.zeros(30, NEURONS), a[50:]])
    assert CettLayer.of(with_zeros, down).at(1.0) == CettLayer.of(a, down).at(1.0)
    assert CettLayer.of(with_zeros, down).solve(0.2).eps == CettLayer.of(a, down).solve(0.2).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tokens_that_are_not_finite_are_skipped(bad):
    a, down = layer_of(7)
    spoilt = torch.cat([a, a[:1]])
    spoilt[-1, 0] = bad
    found, expected = CettLayer.of(spoilt, down).solve(0.2), CettLayer.of(a, down).solve(0.2)
    assert found.tokens == TOKENS
    assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-3)


def test_rho_is_the_mean_ratio_of_squares():
    a, down = layer_of(8)
    norms = down.double().norm(dim=0)
    ratios = [
        float(((row * norms) ** 2).sum() / (down.double() @ row).norm() ** 2) for row in a.double()
    ]  # fmt: skip
    assert CettLayer.of(a, down).rho() == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_rho_tells_cancelling_from_adding_neurons():
    down = torch.ones(3, 4)
    cancelling = torch.tensor([[1.0, -0.9, 1.0, -0.9]])
    assert CettLayer.of(cancelling, down).rho() > 10
    assert CettLayer.of(cancelling.abs(), down).rho() < 0.5


def test_a_target_of_zero_drops_the_zeros_and_only_them():
    a, down = layer_of(9)
    a = torch.where(a > 0, a + 0.1, 0.0)
    found = CettLayer.of(a, down).solve(0.0)
    assert found.cett == 0.0
    assert found.sparsity == pytest.approx(float((a == 0).float().mean()), abs=1e-3)


def test_a_target_of_one_or_more_drops_nearly_everything():
    a, down = layer_of(10)
    assert CettLayer.of(a, down).solve(1.5).sparsity > 0.999


def test_eps_zero_drops_nothing():
    point = CettLayer.of(*layer_of(11)).at(0.0)
    assert (point.cett, point.sparsity) == (0.0, 0.0)


def test_a_layer_that_never_fires_has_no_solution():
    layer = CettLayer.of(torch.zeros(5, NEURONS), layer_of(0)[1])
    assert layer.tokens == 0
    found = CettSolution.of(layer, (0.2,))
    assert (found.targets, found.curve, found.rho) == ({}, (), None)
    empty = CettSolution.of(CettLayer.of(torch.zeros(0, NEURONS), layer_of(0)[1]), (0.2,))
    assert empty.curve == ()


def test_one_token_is_enough_and_has_no_spread():
    a, down = layer_of(12)
    found = CettLayer.of(a[:1], down).solve(0.2)
    eps = naive_solve(a[:1], down, 0.2)
    assert found.sparsity == pytest.approx(naive_at(a[:1], down, eps)[1], abs=1 / NEURONS)
    assert (found.tokens, found.cett_stderr, found.sparsity_stderr) == (1, None, None)


def test_the_standard_error_is_that_of_the_mean_over_tokens():
    a, down = layer_of(13)
    layer = CettLayer.of(a, down)
    shares = [layer.head(i + 1).at(1.0).sparsity * (i + 1) - layer.head(i).at(1.0).sparsity * i for i in range(1, 60)]
    shares.insert(0, layer.head(1).at(1.0).sparsity)
    mean = sum(shares) / 60
    expected = math.sqrt(sum((s - mean) ** 2 for s in shares) / 59 / 60)
    assert layer.head(60).at(1.0).sparsity_stderr == pytest.approx(expected, rel=1e-3)


def test_pieces_of_a_long_sample_are_put_together_in_order(monkeypatch):
    a, down = layer_of(14)
    whole = CettLayer.of(a, down)
    expected = whole.at(1.0), whole.rho()
    monkeypatch.setattr("actsparse.core.tail_norms.CHUNK_ENTRIES", 7 * NEURONS)
    pieces = CettLayer.of(a, down)
    assert torch.allclose(pieces.output_norms, whole.output_norms, rtol=1e-5)
    assert pieces.at(1.0).cett == pytest.approx(expected[0].cett, rel=1e-5)
    assert pieces.rho() == pytest.approx(expected[1], rel=1e-5)


def test_half_precision_activations_are_computed_in_float32():
    a, down = layer_of(15)
    a = a.bfloat16()
    assert CettLayer.of(a, down).at(1.0) == CettLayer.of(a.float(), down).at(1.0)


def test_a_long_sample_is_solved_from_its_first_tokens_and_over_all(monkeypatch):
    a, down = layer_of(16)
    a[TOKENS // 2 :] *= 3
    expected = CettLayer.of(a, down).solve(0.2)
    monkeypatch.setattr("actsparse.core.cett.CURVE_TOKENS", 40)
    assert TOKENS < CURVE_TOKENS
    found = CettLayer.of(a, down).solve(0.2)
    assert found.tokens == TOKENS
    assert found.eps == pytest.approx(expected.eps, rel=3e-5)
    # the first tokens alone would give another threshold
    assert CettLayer.of(a, down).head(40).solve(0.2).eps < 0.8 * expected.eps


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_norms_over_many_thresholds_are_those_of_each_alone(low, monkeypatch):
    monkeypatch.setattr("actsparse.core.native.WORK_PER_THREAD", 1)
    a, down = layer_of(17)
    tail = CettLayer.of(a, down).tail
    thresholds = (0.5, 0.5, 0.9, 2.0, 2.0001, 40.0)
    found = tail.dropped(thresholds, (low, tail.below(low)))
    for eps, norms, shares in zip(thresholds, found.norms, found.shares, strict=True):
        small = a.abs().double() * down.double().norm(dim=0) < eps
        expected = (torch.where(small, a.double(), 0.0) @ down.double().T).norm(dim=1)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shares.double(), small.double().mean(dim=1), rtol=1e-6, atol=0.0)
