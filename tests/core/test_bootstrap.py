import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.bootstrap import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    interval,
    layer_intervals,
    layered_ratio,
    resample_weights,
    stratified_weights,
    weighted_pair_means,
    weighted_pair_ratio,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounds(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_every_resample_draws_as_many_sequences_as_there_are():
    weights = resample_weights(7, resamples=300, seed=3)
    assert weights.shape == (300, 7)
    assert (weights.sum(dim=1) == 7).all()
    # Each sequence is drawn once on average, with the variance of a binomial.
    assert float((weights.mean(dim=0) - 1).abs().max()) < 0.25
    assert float(weights.var()) == pytest.approx(1 - 1 / 7, abs=0.1)


def test_strata_keep_their_sizes():
    strata = torch.tensor([5, 5, 9, 5, 9, 2])
    weights = stratified_weights(strata, resamples=200)
    for stratum, size in ((5, 3), (9, 2), (2, 1)):
        assert (weights[:, strata == stratum].sum(dim=1) == size).all()
    assert float(weights.max()) > 1


def test_the_seed_decides_the_draws():
    assert torch.equal(resample_weights(9, seed=4), resample_weights(9, seed=4))
    assert not torch.equal(resample_weights(9, seed=4), resample_weights(9, seed=5))


def test_fewer_than_200_resamples_are_refused():
    with pytest.raises(ValueError, match="at least 200"):
        bootstrap_mean(normal(5), resamples=199)


def test_ratio_agrees_with_loops_over_the_same_draws():
    above, below = normal(6).abs(), normal(6, seed=1).abs() + 1
    found = bootstrap_ratio(above, below, resamples=250, seed=11)
    samples = []
    for row in resample_weights(6, resamples=250, seed=11).tolist():
        drawn = [place for place, times in enumerate(row) for _ in range(int(times))]
        samples.append(sum(float(above[i]) for i in drawn) / sum(float(below[i]) for i in drawn))
    samples = torch.tensor(samples, dtype=torch.float64)
    assert found.value == pytest.approx(float(above.sum() / below.sum()))
    assert bounds(found) == pytest.approx(samples.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
    assert found.stderr == pytest.approx(float(samples.std()))
    assert found.n == 6


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        low, high = bounds(bootstrap_mean(normal(40, seed=seed) + 3, resamples=200, seed=seed))
        covered += low <= 3 <= high
    assert 0.87 <= covered / 200 <= 0.985


def test_the_standard_error_is_that_of_the_mean():
    values = normal(400)
    assert bootstrap_mean(values, resamples=2000).stderr == pytest.approx(float(values.std()) / 20, rel=0.1)


def test_paired_differences_ignore_what_sequences_share():
    common = 100 * normal(30)
    found = bootstrap_difference(common + 0.5 + 0.1 * normal(30, seed=1), common)
    assert found.stderr is not None
    assert found.stderr < 0.05
    assert not found.touches(0.0)
    assert found.touches(0.5)


def test_undefined_sequences_are_left_out():
    values = torch.tensor([1.0, math.nan, 3.0])
    found = bootstrap_mean(values)
    assert (found.value, found.n) == (2.0, 2)
    assert bootstrap_ratio(torch.ones(3), values).n == 2
    assert bootstrap_difference(values, torch.ones(3)).n == 2


def test_one_sequence_has_a_value_and_no_interval():
    assert bootstrap_mean(torch.tensor([4.0])) == Interval(value=4.0, low=None, high=None, n=1, stderr=None)


def test_nothing_defined_has_neither():
    found = bootstrap_mean(torch.tensor([math.nan, math.nan]))
    assert found == Interval(value=None, low=None, high=None, n=0, stderr=None)
    assert found.touches(0.0)
    assert bootstrap_ratio(torch.zeros(3), torch.zeros(3)).value is None


def test_undefined_resamples_are_left_out_of_the_interval():
    samples = torch.tensor([1.0, 2.0, math.nan, 3.0, math.inf])
    found = interval(2.0, samples, 5, level=0.5)
    assert (found.low, found.high) == (1.5, 2.5)


@pytest.mark.parametrize(("number", "inside"), [(0.9, False), (1.0, True), (2.0, True), (2.1, False)])
def test_touches(number, inside):
    assert Interval(value=1.5, low=1.0, high=2.0, n=3, stderr=0.1).touches(number) is inside


def test_layers_share_their_resamples():
    sums, counts = normal(2, 8), torch.ones(2, 8, dtype=torch.float64)
    sums = torch.cat([sums, -sums[:1]])
    found = layered_ratio(sums, torch.cat([counts, counts[:1]]), seed=7)
    alone = bootstrap_mean(sums[1], seed=7)
    assert found.layers[1].value == pytest.approx(alone.value)
    assert bounds(found.layers[1]) == pytest.approx(bounds(alone))
    # Layers 0 and 2 cancel in every resample, so the mean varies only with layer 1.
    assert found.mean.stderr == pytest.approx((found.layers[1].stderr or 0) / 3)


def test_the_layer_mean_skips_undefined_layers():
    values = torch.tensor([1.0, math.nan, 3.0])
    found = layer_intervals(values, values.expand(200, 3), 4)
    assert found.mean.value == 2.0
    assert found.layers[1].value is None


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_pair_means_agree_with_loops(seed):
    values = normal(2, 4, 4, seed=seed)
    values = values + values.mT
    values[0, 1, 2] = values[0, 2, 1] = math.nan
    weights = torch.tensor([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 1, 0]], dtype=torch.float64)
    found = weighted_pair_means(values, weights)
    for place, row in enumerate(weights.tolist()):
        for layer in range(2):
            above = below = 0.0
            for i in range(4):
                for j in range(4):
                    if i != j and not math.isnan(values[layer, i, j]):
                        above += row[i] * row[j] * float(values[layer, i, j])
                        below += row[i] * row[j]
            expected = above / below if below else math.nan
            assert float(found[place, layer]) == pytest.approx(expected, nan_ok=True)


def test_pair_ratios_weigh_pairs_by_their_number():
    sums = torch.tensor([[[0.0, 6.0, 1.0], [6.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    counts = torch.tensor([[[0.0, 3.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    found = weighted_pair_ratio(sums, counts, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 2.0]], dtype=torch.float64))
    assert found.flatten().tolist() == [7 / 4, 1.0]
