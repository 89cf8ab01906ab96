import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.stats import gini, mean_stderr, median_interval

VALUES = st.lists(st.floats(0, 1e3), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True)
@given(values=VALUES)
def test_gini_is_half_the_mean_difference_over_the_mean(values):
    total = sum(values)
    pairs = sum(abs(a - b) for a in values for b in values)
    expected = pairs / (2 * len(values) * total) if total > 0 else 0.0
    assert gini(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, abs=1e-9)


def test_gini_of_equals_is_zero_and_of_one_owner_nearly_one():
    assert gini(torch.full((100,), 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert gini(torch.tensor([0.0] * 99 + [5.0])) == pytest.approx(0.99)
    assert gini(torch.zeros(4)) == 0.0
    assert gini(torch.zeros(0)) == 0.0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=25), seed=st.integers(0, 5))
def test_the_median_lies_in_its_interval_and_the_interval_in_the_sample(values, seed):
    median, low, high = median_interval(torch.tensor(values, dtype=torch.float64), seed=seed)
    assert median == pytest.approx(statistics.median(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert low <= median + 1e-9
    assert high >= median - 1e-9


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 40, generator=generator)
    bounds = [median_interval(sample, level=0.9, resamples=200, seed=i)[1:] for i, sample in enumerate(samples)]
    covered = sum(low <= 0 <= high for low, high in bounds) / 200
    assert 0.82 < covered < 0.97


def test_a_higher_level_is_wider_and_the_seed_decides():
    sample = torch.randn(30, generator=torch.Generator().manual_seed(1))
    _, low90, high90 = median_interval(sample, level=0.9)
    _, low99, high99 = median_interval(sample, level=0.99)
    assert low99 < low90 < high90 < high99
    assert median_interval(sample, seed=3) == median_interval(sample, seed=3)
    drawn = {median_interval(sample, seed=seed) for seed in range(5)}
    assert len(drawn) > 1


def test_the_error_of_a_mean_is_that_of_its_groups():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(40, generator=generator, dtype=torch.float64)
    values = (own[:, None] + 0.1 * torch.randn(40, 25, generator=generator, dtype=torch.float64)).flatten()
    groups = torch.arange(40).repeat_interleave(25)
    order = torch.randperm(len(values), generator=generator)
    found = mean_stderr(values[order], 7 - 3 * groups[order])
    means = values.view(40, 25).mean(dim=1)
    assert found == pytest.approx(float(means.std()) / 40**0.5)
    # values taken for independent would make it five times smaller
    assert mean_stderr(values) == pytest.approx(float(values.std()) / 1000**0.5)
    assert found > 4 * mean_stderr(values)


def test_one_value_or_one_group_has_no_error():
    assert mean_stderr(torch.ones(1)) is None
    assert mean_stderr(torch.rand(5), torch.zeros(5, dtype=torch.long)) is None
    assert mean_stderr(torch.rand(0), torch.zeros(0, dtype=torch.long)) is None
