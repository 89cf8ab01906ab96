"""The compiled pass over rows, the torch pass and the definitions: the same numbers."""

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from actsparse.core import row_sums_cpu
from actsparse.core.native import library
from actsparse.core.quantiles import BINS, FIRST_BIN
from actsparse.core.row_sums import add_columns, add_entries, add_squares
from actsparse.core.rows import ColumnSums, EntrySums, Rows

WIDTH, K = 37, 7
NORMS = torch.linspace(0.5, 2.0, WIDTH)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(row_sums_cpu, "library", lambda _source: None)
    elif library("row_sums.cpp") is None:
        pytest.skip("no C++ compiler here")
    return request.param


def activations(tokens: int, seed: int = 0) -> Tensor:
    """Half of them zero, over many octaves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator) * torch.exp2(torch.randint(-30, 18, (tokens, WIDTH)).float())
    return torch.where(torch.rand(tokens, WIDTH, generator=generator) < 0.5, x, 0.0)


def entries() -> EntrySums:
    count, seen = torch.zeros(BINS, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    return EntrySums(count, torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.float64), seen)


def columns() -> ColumnSums:
    counts = {name: torch.zeros(WIDTH, dtype=torch.int64) for name in ("active", "nonzero")}
    names = ("total", "total_abs", "share_square", "largest")
    return ColumnSums(**counts, **{name: torch.zeros(WIDTH, dtype=torch.float64) for name in names})


def naive_bin(value: float) -> int:
    """The bin of a magnitude by its definition: 1,024 equal steps an octave, from 2^-27 on."""
    mantissa, exponent = math.frexp(abs(value))
    return (exponent - 1 + 27) * 1024 + int((2 * mantissa - 1) * 1024)


def test_entries_are_counted_and_summed_by_their_definition(way: str) -> None:
    x, found = activations(50), entries()
    add_entries(Rows.of(x), found, FIRST_BIN)
    values = x.double().flatten().tolist()
    counts = torch.zeros(BINS, dtype=torch.int64)
    apart = [0, 0, 0]
    for value in values:
        place = naive_bin(value) if value else -1
        if value == 0 or place < 0:
            apart[0 if value == 0 else 1] += 1
        elif place >= BINS:
            apart[2] += 1
        else:
            counts[place] += 1
    assert torch.equal(found.counts, counts)
    assert found.apart.tolist() == apart
    assert min(apart) > 0
    assert found.seen.tolist() == [len(values), 0]
    assert found.sums.tolist() == pytest.approx(
        [math.fsum(values), math.fsum(map(abs, values)), math.fsum(v * v for v in values), max(map(abs, values))],
        rel=1e-5,
    )


def test_columns_are_summed_by_their_definition(way: str) -> None:
    a, found = activations(60), columns()
    a[5] = 0.0
    squares, zeros = add_columns(Rows.of(a), NORMS, K, found)
    exact = a.double()
    lengths = exact.square().sum(dim=1)
    active = torch.zeros(WIDTH, dtype=torch.int64)
    for scores in (a.abs() * NORMS).tolist():
        for place in sorted(range(WIDTH), key=lambda i: -scores[i])[:K]:
            active[place] += scores[place] > 0
    assert torch.equal(found.active, active)
    assert torch.equal(found.nonzero, (a != 0).sum(dim=0))
    torch.testing.assert_close(found.total, exact.sum(dim=0))
    torch.testing.assert_close(found.total_abs, exact.abs().sum(dim=0))
    torch.testing.assert_close(found.largest, exact.abs().amax(dim=0))
    shares = (exact.square() / lengths[:, None]).nan_to_num(0.0)
    torch.testing.assert_close(found.share_square, shares.sum(dim=0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(squares, lengths, rtol=1e-6, atol=0.0)
    assert torch.equal(zeros, (a == 0).sum(dim=1))


def test_how_rows_are_grouped_changes_no_count_and_no_sum_by_1e_9(way: str) -> None:
    a = activations(90, seed=3)
    at_once, apart, whole, parted = entries(), entries(), columns(), columns()
    squares = torch.zeros(2, WIDTH, dtype=torch.float64)
    add_entries(Rows.of(a), at_once, FIRST_BIN)
    add_columns(Rows.of(a), NORMS, K, whole)
    add_squares(Rows.of(a), squares[0])
    for start, stop in pairwise((0, 1, 14, 15, 60, 90)):
        add_entries(Rows.of(a[start:stop]), apart, FIRST_BIN)
        add_columns(Rows.of(a[start:stop]), NORMS, K, parted)
        add_squares(Rows.of(a[start:stop]), squares[1])
    for one, other in ((at_once, apart), (whole, parted)):
        for part in fields(one):
            mine, theirs = getattr(one, part.name), getattr(other, part.name)
            if mine.dtype == torch.int64:
                assert torch.equal(mine, theirs), part.name
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=part.name)
    torch.testing.assert_close(squares[0], squares[1], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chosen_rows_of_a_strided_view_count_like_a_copy_of_them(way: str, dtype: torch.dtype) -> None:
    # a fused gate_up projection gives such views
    both = torch.cat([activations(24, 1), activations(24, 2)], dim=1).clamp(-60000, 60000).to(dtype).view(3, 8, -1)
    view, index = both[..., WIDTH:], torch.tensor([1, 2, 7, 9, 10, 23])
    found, expected, sums, copied = entries(), entries(), columns(), columns()
    add_entries(Rows.of(view, index), found, FIRST_BIN)
    add_columns(Rows.of(view, index), NORMS, K, sums)
    rows = view.reshape(-1, WIDTH)[index].float()
    add_entries(Rows.of(rows), expected, FIRST_BIN)
    add_columns(Rows.of(rows), NORMS, K, copied)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.apart, expected.apart)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=1e-9)
    assert torch.equal(sums.active, copied.active)
    torch.testing.assert_close(sums.total, copied.total, rtol=1e-9, atol=1e-9)


def test_entries_that_are_no_numbers_are_counted_and_read_as_zeros(way: str) -> None:
    a = activations(9)
    a[0, 1], a[3, 3], a[3, 4] = math.nan, math.inf, -math.inf
    clean = a.nan_to_num(0.0, 0.0, 0.0)
    found, expected, sums, cleaned = entries(), entries(), columns(), columns()
    add_entries(Rows.of(a), found, FIRST_BIN)
    add_entries(Rows.of(clean), expected, FIRST_BIN)
    assert found.seen.tolist() == [9 * WIDTH, 3]
    assert torch.equal(found.sums, expected.sums)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.apart, expected.apart)
    for x, into in ((a, sums), (clean, cleaned)):
        add_columns(Rows.of(x), NORMS, K, into)
    assert all(torch.equal(getattr(sums, part.name), getattr(cleaned, part.name)) for part in fields(ColumnSums))


def test_threads_share_the_rows_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if library("row_sums.cpp") is None:
        pytest.skip("no C++ compiler here")
    a = activations(200)
    monkeypatch.setattr("actsparse.core.native.WORK_PER_THREAD", 1)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        one, sums = entries(), columns()
        add_entries(Rows.of(a), one, FIRST_BIN)
        squares, zeros = add_columns(Rows.of(a), NORMS, K, sums)
        found.append((one, sums, squares, zeros))
    (one, sums, squares, zeros), (other, more, again, same) = found
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.apart, other.apart)
    assert torch.equal(sums.active, more.active)
    torch.testing.assert_close(sums.total, more.total, rtol=1e-12, atol=0.0)
    assert torch.equal(squares, again)
    assert torch.equal(zeros, same)


@pytest.mark.parametrize("k", [1, 2, WIDTH - 1, WIDTH])
def test_ties_and_extreme_counts_of_the_top_set(way: str, k: int) -> None:
    a = torch.tensor([[1.0] * WIDTH, [float(i % 5) for i in range(WIDTH)], [1e-38] * WIDTH])
    found = columns()
    add_columns(Rows.of(a), torch.ones(WIDTH), k, found)
    expected = torch.zeros(WIDTH, dtype=torch.int64)
    for row in a.tolist():
        least = sorted(row, reverse=True)[k - 1]
        expected += torch.tensor([value >= least and value > 0 for value in row]).long()
    assert torch.equal(found.active, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_counted_by_their_patterns_like_their_values(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums_cpu, "library", lambda _source: None)
    x = activations(70).clamp(-60000, 60000).to(dtype)
    x[3, 5], x[4, 6], x[5, 7], x[6, 8] = math.nan, math.inf, -math.inf, -0.0
    found, expected = entries(), entries()
    add_entries(Rows.of(x), found, FIRST_BIN)
    add_entries(Rows.of(x.float()), expected, FIRST_BIN)
    assert found.seen.tolist() == expected.seen.tolist() == [70 * WIDTH, 3]
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.apart, expected.apart)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=1e-6)
    exact = x.double().nan_to_num(0.0, 0.0, 0.0)
    sums = [exact.sum(), exact.abs().sum(), exact.square().sum(), exact.abs().max()]
    torch.testing.assert_close(found.sums, torch.stack(sums), rtol=1e-12, atol=0.0)
