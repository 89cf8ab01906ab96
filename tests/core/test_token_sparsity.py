import pytest
import torch

from actsparse.core.token_sparsity import spread_over_tokens, token_sparsity

EDGES = (0, 1, 2, 4, 8, 16)


def test_it_is_the_share_under_the_threshold_token_by_token():
    generator = torch.Generator().manual_seed(3)
    a, norms = torch.randn(40, 12, generator=generator), torch.rand(12, generator=generator)
    positions = torch.randint(4, 20, (40,), generator=generator)
    spread = spread_over_tokens(token_sparsity(a, norms, 0.4), positions, EDGES)
    found = spread.by_position
    for one in found:
        shares = [
            sum(abs(float(a[t, i])) * float(norms[i]) < 0.4 for i in range(12)) / 12
            for t in range(40)
            if one.start <= int(positions[t]) < one.stop
        ]
        assert one.tokens == len(shares)
        assert one.share == pytest.approx(sum(shares) / len(shares), abs=1e-9)
    assert sum(one.tokens for one in found) == 40
    assert [(one.start, one.stop) for one in found] == [(4, 8), (8, 16), (16, 32)]


def test_a_drift_with_the_position_is_found():
    positions = torch.arange(4, 16)
    a = torch.where(torch.arange(100)[None] < positions[:, None] * 5, 0.0, 1.0)
    early, late = spread_over_tokens(token_sparsity(a, torch.ones(100), 0.5), positions, EDGES).by_position
    assert early.share == pytest.approx(0.275)
    assert late.share == pytest.approx(0.575)


def test_the_band_holds_the_middle_of_the_tokens():
    shares = torch.arange(101, dtype=torch.float64) / 100
    found = spread_over_tokens(shares[torch.randperm(101)], torch.full((101,), 9), EDGES)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.9))
    assert found.tokens == 101
