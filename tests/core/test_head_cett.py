"""CETT with heads as units against loops."""

import pytest
import torch

from actsparse.core.head_cett import HeadCett


def drawn(tokens: int = 7, heads: int = 5, part: int = 3, hidden: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, heads * part, generator=generator), torch.randn(
        hidden, heads * part, generator=generator
    )


@pytest.mark.parametrize("eps", [0.0, 3.0, 6.0, 100.0])
def test_at_a_threshold(eps: float) -> None:
    o, weight = drawn()
    ratios, shares = [], []
    for row in o:
        outputs = [weight[:, 3 * h : 3 * h + 3] @ row[3 * h : 3 * h + 3] for h in range(5)]
        small = [n for n in outputs if float(n.norm()) < eps]
        ratios.append(float(sum(small, torch.zeros(11)).norm() / sum(outputs, torch.zeros(11)).norm()))
        shares.append(len(small) / 5)
    point = HeadCett.of(o, weight, 5).at(eps)
    assert point.cett == pytest.approx(sum(ratios) / 7, abs=1e-5)
    assert point.sparsity == pytest.approx(sum(shares) / 7)


def test_the_solution_is_the_largest_threshold_within_the_target() -> None:
    o, weight = drawn(tokens=200)
    layer = HeadCett.of(o, weight, 5)
    point = layer.solve(0.3)
    assert point.cett <= 0.3
    assert layer.at(point.eps * 1.01 + 1e-6).cett > point.cett
    assert layer.at(1.05 * point.eps).cett > 0.3
    assert layer.solve(10.0).sparsity == pytest.approx(1.0, abs=0.01)
    assert layer.solve(0.0).cett == 0


def test_a_head_that_adds_nothing_costs_nothing_and_silent_tokens_are_left_out() -> None:
    o, weight = drawn(tokens=50)
    o[:, :3] = 0
    o[7] = 0
    layer = HeadCett.of(o, weight, 5)
    assert layer.tokens == 49
    assert layer.solve(1e-6).sparsity == pytest.approx(1 / 5)
