import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.head_norms import HeadNorms, unit_grams
from actsparse.core.row_sums import output_norms
from actsparse.core.rows import Rows
from actsparse.core.streaming import POSITION_EDGES, HeadSums, Moments, NeuronSums

NEURONS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 15, 4, 2, 3, 10
NORMS = torch.linspace(0.5, 2.0, NEURONS)
COUNTS = ("seen", "active", "nonzero", "position_zeros", "position_tokens", "largest")
CUTS = st.lists(st.integers(0, 30), max_size=4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relu_like(tokens: int, seed: int = 0) -> torch.Tensor:
    """Activations with many zeros and some rows of nothing else."""
    a = normal(tokens, NEURONS, seed=seed).relu()
    a[::7] = 0.0
    return a


def pieces(x: torch.Tensor, cuts: list[int]) -> list[tuple[int, torch.Tensor]]:
    bounds = [0, *sorted(cuts), len(x)]
    return [(start, x[start:stop]) for start, stop in pairwise(bounds) if stop > start]


def moments_of(*parts: torch.Tensor) -> Moments:
    moments = Moments()
    for part in parts:
        moments.add(Rows.of(part))
    return moments


def add_to(sums: NeuronSums, a: torch.Tensor, first_position: int = 4) -> None:
    sums.add(Rows.of(a), NORMS[: a.shape[1]], torch.arange(first_position, first_position + len(a)))


def neurons_of(a: torch.Tensor, first_position: int = 4) -> NeuronSums:
    sums = NeuronSums.zeros(a.shape[1])
    add_to(sums, a, first_position)
    return sums


def assert_equal_sums(found: NeuronSums, expected: NeuronSums, rel: float) -> None:
    """Counts exactly, sums to `rel`."""
    for part in fields(NeuronSums):
        mine, other = torch.as_tensor(getattr(found, part.name)), torch.as_tensor(getattr(expected, part.name))
        if part.name in COUNTS:
            assert torch.equal(mine, other), part.name
        else:
            assert torch.allclose(mine, other, rtol=rel, atol=1e-12), part.name


# Moments


def test_moments_are_the_sums_of_every_entry():
    x = normal(40, 9)
    found, entries = moments_of(x), x.double().flatten().tolist()
    assert found.count == 360
    assert found.total == pytest.approx(math.fsum(entries), rel=1e-5)
    assert found.total_abs == pytest.approx(math.fsum(map(abs, entries)), rel=1e-6)
    assert found.total_square == pytest.approx(math.fsum(v * v for v in entries), rel=1e-6)
    assert found.largest == max(map(abs, entries))
    assert found.histogram.total == 360
    assert found.not_finite == 0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(cuts=CUTS, seed=st.integers(0, 50))
def test_moments_merge_to_what_one_pass_sees(cuts, seed):
    x = normal(30, 6, seed=seed)
    at_once, merged = moments_of(x), Moments()
    for _, part in pieces(x, cuts):
        merged.merge(moments_of(part))
    assert (merged.count, merged.largest) == (at_once.count, at_once.largest)
    assert torch.equal(merged.histogram.counts, at_once.histogram.counts)
    for name in ("total", "total_abs", "total_square"):
        assert getattr(merged, name) == pytest.approx(getattr(at_once, name), rel=1e-9, abs=1e-9)


def test_entries_that_are_no_numbers_are_counted_apart_and_are_no_zeros():
    x = normal(8, 5)
    clean = x.clone()
    for row, column, bad in ((0, 1, math.nan), (3, 3, math.inf), (7, 0, -math.inf)):
        x[row, column], clean[row, column] = bad, 0.0
    found, expected = moments_of(x), moments_of(clean)
    assert found.not_finite == 3
    assert found.count == 40
    assert (found.total, found.total_abs, found.total_square, found.largest) == (
        expected.total, expected.total_abs, expected.total_square, expected.largest,
    )  # fmt: skip
    assert found.finite == 37
    assert (found.histogram.zeros, found.histogram.above, found.histogram.total) == (0, 0, 37)


def test_infinities_that_cancel_are_seen():
    assert moments_of(torch.tensor([[math.inf, -math.inf, 1.0]])).not_finite == 2


def test_moments_survive_a_shard():
    found = moments_of(normal(5, 4), torch.tensor([[math.nan, 0.0, 1.0, 2e9]]))
    again = Moments.of_tensors(found.tensors())
    assert (again.count, again.total, again.total_abs, again.total_square, again.largest, again.not_finite) == (
        found.count, found.total, found.total_abs, found.total_square, found.largest, found.not_finite,
    )  # fmt: skip
    assert torch.equal(again.histogram.counts, found.histogram.counts)
    assert (again.histogram.zeros, again.histogram.above) == (1, 1)


def test_no_tokens_change_nothing():
    found = moments_of(torch.zeros(0, 5))
    assert (found.count, found.largest, found.histogram.total) == (0, 0.0, 0)


# NeuronSums


def naive_share_square(a: torch.Tensor) -> list[float]:
    """GRIFFIN's statistic, squared and not yet averaged (methods.md, section 3), by loops."""
    shares = [0.0] * a.shape[1]
    for row in a.double().tolist():
        length = math.sqrt(math.fsum(value * value for value in row))
        if length > 0:
            shares = [share + (value / length) ** 2 for share, value in zip(shares, row, strict=True)]
    return shares


def naive_active(a: torch.Tensor, k: int) -> list[int]:
    """In how many tokens a neuron is among the k largest |a|*||w||, by sorting."""
    counts = [0] * a.shape[1]
    for row in (a.abs() * NORMS[: a.shape[1]]).tolist():
        for place in sorted(range(len(row)), key=lambda i: -row[i])[:k]:
            counts[place] += row[place] > 0
    return counts


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 100), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e12]))
def test_share_square_is_griffins_statistic_at_any_scale(seed, scale):
    a = relu_like(20, seed) * scale
    found = neurons_of(a)
    assert found.share_square.tolist() == pytest.approx(naive_share_square(a), rel=1e-5, abs=1e-9)
    assert float(found.share_square.sum()) == pytest.approx(found.rows, rel=1e-5)


def test_neuron_sums_are_their_definitions():
    a, u = relu_like(50, 1), normal(50, NEURONS, seed=2)
    found = neurons_of(a)
    found.add_up(Rows.of(u))
    assert found.tokens == 50
    assert found.rows == sum(any(row) for row in a.tolist())
    assert found.nonzero.tolist() == [sum(v != 0 for v in column) for column in a.T.tolist()]
    # 20 % of 15 neurons are 3.
    assert found.active.tolist() == naive_active(a, 3)
    assert torch.allclose(found.total, a.double().sum(0), rtol=1e-6)
    assert torch.allclose(found.total_abs, a.double().abs().sum(0), rtol=1e-6)
    assert torch.equal(found.largest, a.abs().amax(0).double())
    assert torch.allclose(found.square_up, u.double().square().sum(0), rtol=1e-6)


def test_signed_activations_count_by_magnitude():
    a = normal(30, NEURONS)
    assert torch.equal(neurons_of(a).active, neurons_of(-a).active)
    assert torch.equal(neurons_of(a).share_square, neurons_of(-a).share_square)
    assert torch.equal(neurons_of(a).total, -neurons_of(-a).total)


def test_rows_of_zeros_are_tokens_that_nothing_fires_in():
    found = neurons_of(torch.zeros(6, NEURONS))
    assert (found.tokens, found.rows) == (6, 0)
    for name in ("active", "nonzero", "share_square", "total", "position_square"):
        assert not getattr(found, name).any(), name
    assert int(found.position_zeros.sum()) == 6 * NEURONS


def test_a_row_with_fewer_firing_neurons_than_the_top_fifth_counts_only_those():
    a = torch.zeros(1, NEURONS)
    a[0, 7] = -0.5
    assert neurons_of(a).active.nonzero().flatten().tolist() == [7]


def test_entries_that_are_no_numbers_leave_the_neuron_sums_finite():
    a = relu_like(9)
    clean = a.clone()
    a[1, 2], a[2, 3], a[3, 4] = math.nan, math.inf, -math.inf
    clean[1, 2] = clean[2, 3] = clean[3, 4] = 0.0
    assert_equal_sums(neurons_of(a), neurons_of(clean), rel=0.0)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(cuts=CUTS, seed=st.integers(0, 50), first=st.integers(0, 40))
def test_neuron_sums_merge_to_what_one_pass_sees(cuts, seed, first):
    # Quarters add without rounding: what differs is then the merging, not the order of a float32 sum.
    a = (relu_like(30, seed) * 4).round() / 4
    merged = NeuronSums.zeros(NEURONS)
    for start, part in pieces(a, cuts):
        merged.merge(neurons_of(part, first + start))
    at_once = neurons_of(a, first)
    assert_equal_sums(merged, at_once, rel=1e-6)
    assert torch.equal(merged.total, at_once.total)
    assert torch.equal(merged.position_square, at_once.position_square)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(order=st.permutations(range(5)), cut=st.integers(0, 5))
def test_sequences_merge_in_any_order_exactly_in_counts_and_to_1e_9_in_sums(order, cut):
    sequences = [relu_like(3 + 4 * i, i) for i in range(5)]
    at_once, first, second = (NeuronSums.zeros(NEURONS) for _ in range(3))
    for a in sequences:
        add_to(at_once, a)
    for place, i in enumerate(order):
        add_to(first if place < cut else second, sequences[i])
    first.merge(second)
    assert_equal_sums(first, at_once, rel=1e-9)


def test_positions_fall_into_their_bins():
    a = relu_like(140, 3)
    found = neurons_of(a, first_position=4)
    expected = {"tokens": [0] * len(POSITION_EDGES), "zeros": [0] * len(POSITION_EDGES)}
    squares = [0.0] * len(POSITION_EDGES)
    for position, row in enumerate(a.tolist(), 4):
        place = max(i for i, edge in enumerate(POSITION_EDGES) if edge <= position)
        expected["tokens"][place] += 1
        expected["zeros"][place] += sum(value == 0 for value in row)
        squares[place] += sum(value * value for value in row)
    assert found.position_tokens.tolist() == expected["tokens"]
    assert found.position_zeros.tolist() == expected["zeros"]
    assert found.position_square.tolist() == pytest.approx(squares, rel=1e-5)
    assert found.position_tokens[:3].tolist() == [0, 0, 0]
    assert found.position_tokens[3].item() == 4


def test_positions_beyond_the_last_edge_stay_in_the_last_bin():
    found = neurons_of(relu_like(3), first_position=500_000)
    assert found.position_tokens.tolist() == [0] * (len(POSITION_EDGES) - 1) + [3]


def test_neuron_sums_survive_a_shard():
    found = neurons_of(relu_like(11))
    assert_equal_sums(NeuronSums.of_tensors(found.tensors()), found, rel=0.0)


def test_a_sequence_without_tokens_adds_nothing_to_the_neurons():
    found = neurons_of(torch.zeros(0, NEURONS))
    assert found.tokens == 0


# HeadSums


def output_projection() -> torch.Tensor:
    return normal(HIDDEN, HEADS * HEAD_DIM, seed=5)


def naive_norms(o: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """||W_h o_h|| by the products themselves, in float64."""
    part = o.shape[1] // units
    columns = [slice(unit * part, (unit + 1) * part) for unit in range(units)]
    return torch.stack([(o[:, c].double() @ weight[:, c].double().T).norm(dim=1) for c in columns], dim=1)


@pytest.mark.parametrize("units", [HEADS, KV_HEADS, 1])
def test_output_norms_are_the_norms_of_the_products(units):
    o, weight = normal(20, HEADS * HEAD_DIM, seed=6), output_projection()
    o[3] = 0.0
    grams = unit_grams(weight, units)
    assert torch.allclose(output_norms(o, grams).double(), naive_norms(o, weight, units), rtol=1e-5, atol=1e-6)


def test_a_groups_norm_is_that_of_the_sum_of_its_heads_not_the_sum_of_their_norms():
    weight, o = output_projection(), normal(10, HEADS * HEAD_DIM, seed=7)
    sums = HeadSums.zeros(HEADS, KV_HEADS)
    sums.add(Rows.of(o), HeadNorms.of(weight, HEADS, KV_HEADS))
    outputs = torch.stack([o[:, 3 * h : 3 * h + 3] @ weight[:, 3 * h : 3 * h + 3].T for h in range(HEADS)])
    of_groups = outputs.view(KV_HEADS, 2, 10, HIDDEN).sum(dim=1)
    assert torch.allclose(sums.heads.float(), outputs.norm(dim=2).sum(dim=1), rtol=1e-4)
    assert torch.allclose(sums.groups.float(), of_groups.norm(dim=2).sum(dim=1), rtol=1e-4)
    assert (sums.groups < sums.heads.view(KV_HEADS, 2).sum(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_of_all_heads_is_read_from_the_projection_itself(dtype):
    weight, o = output_projection().to(dtype), normal(10, HEADS * HEAD_DIM, seed=7).to(dtype)
    norms, sums = HeadNorms.of(weight, HEADS, 1), HeadSums.zeros(HEADS, 1)
    assert norms.groups is weight
    sums.add(Rows.of(o), norms)
    assert torch.allclose(sums.groups, naive_norms(o, weight, 1).sum(dim=0), rtol=1e-5)
    assert torch.allclose(sums.heads, naive_norms(o, weight, HEADS).sum(dim=0), rtol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(order=st.permutations(range(4)), cut=st.integers(0, 4))
def test_head_sums_merge_to_what_one_pass_sees_and_survive_a_shard(order, cut):
    grams = HeadNorms.of(output_projection(), HEADS, KV_HEADS)
    sequences = [normal(2 + 3 * i, HEADS * HEAD_DIM, seed=i) for i in range(4)]
    at_once, first, second = (HeadSums.zeros(HEADS, KV_HEADS) for _ in range(3))
    for o in sequences:
        at_once.add(Rows.of(o), grams)
    for place, i in enumerate(order):
        (first if place < cut else second).add(Rows.of(sequences[i]), grams)
    first.merge(HeadSums.of_tensors(second.tensors()))
    assert first.tokens == at_once.tokens == 26
    assert torch.allclose(first.heads, at_once.heads, rtol=1e-9)
    assert torch.allclose(first.groups, at_once.groups, rtol=1e-9)
