import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.quantiles import BINS, LogHistogram, bin_edges, quantile_of, share_below

LOWEST, HIGHEST = 2.0**-27, 2.0**17
IN_RANGE = st.floats(LOWEST, 131_000.0, width=32)
MAGNITUDES = st.lists(IN_RANGE, min_size=1, max_size=60)
TINY = st.floats(0, 2.0**-30, width=32)
ANY = st.lists(st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0]), TINY), max_size=40)


def counted(values: list[float]) -> LogHistogram:
    histogram = LogHistogram()
    histogram.add(torch.tensor(values, dtype=torch.float32))
    return histogram


def same(first: LogHistogram, second: LogHistogram) -> bool:
    apart = (first.zeros, first.below, first.above) == (second.zeros, second.below, second.above)
    return apart and torch.equal(first.counts, second.counts)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(values=MAGNITUDES, share=st.floats(0, 1))
def test_a_quantile_is_the_floor_sn_th_smallest_within_half_a_tenth_of_a_percent(values, share):
    exact = sorted(values)[min(len(values) - 1, math.floor(share * len(values)))]
    assert counted(values).quantile(share) == pytest.approx(exact, rel=0.0005)


def test_the_sign_does_not_count():
    assert same(counted([-1.5, 2.0, -0.25]), counted([1.5, -2.0, 0.25]))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(first=ANY, second=ANY)
def test_merging_is_counting_everything_at_once(first, second):
    merged = counted(first)
    merged.merge(counted(second))
    assert same(merged, counted(first + second))
    assert same(merged, counted(second + first))
    assert merged.total == len(first) + len(second)


def test_zeros_smaller_and_larger_values_are_counted_apart():
    found = counted([0.0, -0.0, LOWEST * 0.999, -1e-30, LOWEST, 1.0, HIGHEST * 0.9999, HIGHEST, -1e30])
    assert (found.zeros, found.below, found.above) == (2, 2, 2)
    assert int(found.counts.sum()) == 3
    assert found.counts[0] == 1
    assert found.counts[BINS - 1] == 1


def test_what_is_not_a_number_or_infinite_counts_as_above():
    assert counted([math.nan, math.inf, -math.inf, 1.0]).above == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_shape_counts_like_its_values_in_float32(dtype):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = LogHistogram()
    found.add(x.transpose(0, 2))
    assert same(found, counted(x.float().flatten().tolist()))


def test_the_quantile_of_zeros_and_tiny_values_is_zero():
    mostly_zero = counted([0.0] * 7 + [1e-12] * 2 + [3.0])
    assert mostly_zero.quantile(0.0) == 0.0
    assert mostly_zero.quantile(0.89) == 0.0
    assert mostly_zero.quantile(0.9) == pytest.approx(3.0, rel=0.0005)


@pytest.mark.parametrize("values", [[1e6], [1.0, 1e6], [0.0, 0.5, 2e5, 3e5]])
def test_a_quantile_among_values_above_the_range_is_at_least_the_end_of_the_range(values):
    assert counted(values).quantile(1.0) >= HIGHEST


def test_nothing_counted_has_no_quantile():
    assert math.isnan(LogHistogram().quantile(0.5))
    assert math.isnan(share_below(*LogHistogram().trimmed(), 1.0))


@pytest.mark.parametrize("share", [-0.01, 1.01, 50.0, math.nan])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        counted([1.0, 2.0]).quantile(share)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(values=ANY.filter(len), share=st.floats(0, 1))
def test_trimming_keeps_the_total_and_the_quantiles(values, share):
    found = counted(values)
    counts, edges = found.trimmed()
    assert len(edges) == len(counts) + 1
    assert int(counts.sum()) == len(values)
    assert (edges.diff() > 0).all()
    assert quantile_of(counts, edges, share) == found.quantile(share)


def test_bin_edges_are_exact_floats_and_under_a_tenth_of_a_percent_apart():
    edges = bin_edges(0, BINS + 1)
    assert float(edges[0]) == LOWEST
    assert float(edges[-1]) == HIGHEST
    assert torch.equal(edges, edges.float().double())
    ratio = edges[1:] / edges[:-1]
    assert float(ratio.min()) > 1
    assert float(ratio.max()) < 1.00098


def test_an_edge_falls_into_the_bin_that_it_opens():
    for index in (0, 1, 1023, 1024, 31_337, BINS - 1):
        assert counted([float(bin_edges(index, index + 1)[0])]).counts.nonzero().flatten().tolist() == [index]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(values=st.lists(st.one_of(st.just(0.0), IN_RANGE), min_size=1, max_size=30), threshold=IN_RANGE)
def test_the_share_below_is_exact_where_no_value_is_within_a_bin_of_the_threshold(values, threshold):
    values = [value for value in values if abs(value - threshold) > 0.001 * threshold] or [0.0]
    expected = sum(value < threshold for value in values) / len(values)
    assert share_below(*counted(values).trimmed(), threshold) == pytest.approx(expected)


def test_the_state_survives_a_shard():
    found = counted([0.0, 1e-20, 1.0, 1.0, 1e9])
    assert same(LogHistogram.of_tensors(found.tensors()), found)
