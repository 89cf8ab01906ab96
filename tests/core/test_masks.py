import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core import masks as masks_module
from actsparse.core.masks import kept_count, row_threshold, top_mask
from actsparse.core.overlap import topk_masks

ROWS = st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("density", "width", "count"),
    [(0.5, 1536, 768), (0.5, 5, 3), (0.2, 1536, 307), (0.0, 7, 1), (1.0, 7, 7), (0.25, 10, 3), (0.24, 10, 2)],
)
def test_kept_count_rounds_half_up_and_keeps_at_least_one_and_at_most_all(density, width, count):
    assert kept_count(density, width) == count


@settings(deadline=None, derandomize=True)
@given(rows=ROWS, k=st.integers(1, 8))
def test_top_mask_keeps_exactly_k_and_the_lower_index_of_equals(rows, k):
    masks = top_mask(torch.tensor(rows, dtype=torch.float32), k)
    for row, mask in zip(rows, masks.tolist(), strict=True):
        ranked = sorted(range(8), key=lambda place: (-row[place], place))
        assert {place for place, kept in enumerate(mask) if kept} == set(ranked[:k])


def test_top_mask_serves_any_leading_shape():
    scores = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0))
    found = top_mask(scores, 4)
    assert torch.equal(found, top_mask(scores.view(6, 9), 4).view(2, 3, 9))
    assert torch.equal(top_mask(scores[0, 0], 4), found[0, 0])


@settings(deadline=None, derandomize=True)
@given(rows=ROWS, k=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_row_threshold_is_the_k_th_largest(rows, k, dtype):
    found = row_threshold(torch.tensor(rows, dtype=dtype), k)
    assert found.shape == (len(rows), 1)
    assert found.flatten().tolist() == [sorted(row, reverse=True)[k - 1] for row in rows]


def test_row_threshold_leaves_its_input_alone_and_reads_strided_views():
    scores = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)).T
    before = scores.clone()
    found = row_threshold(scores, 5)
    assert torch.equal(scores, before)
    assert torch.equal(found, scores.sort(dim=1, descending=True).values[:, 4:5])
    assert ((scores >= found).sum(dim=1) == 5).all()


@given(density=st.floats(0, 1), width=st.integers(1, 20_000))
@settings(deadline=None, derandomize=True)
def test_kept_count_is_its_formula(density, width):
    assert kept_count(density, width) == min(width, max(1, math.floor(density * width + 0.5)))


def test_ties_go_to_the_lower_index_in_wide_rows_too():
    scores = torch.randint(0, 3, (3, 5000), generator=torch.Generator().manual_seed(2)).float()
    for row, mask in zip(scores, top_mask(scores, 2000), strict=True):
        ranked = sorted(range(5000), key=lambda place: (-float(row[place]), place))
        assert mask.nonzero().flatten().tolist() == sorted(ranked[:2000])


@pytest.mark.parametrize("k", [1, 7, 63, 64])
def test_the_compiled_search_finds_what_torch_finds(k, monkeypatch):
    scores = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    scores[0], scores[1, ::2], scores[2, 5], scores[3, 9] = 0.0, -0.0, math.inf, -math.inf
    scores[4] = scores[4].sign()
    compiled = top_mask(scores, k), row_threshold(scores, k), topk_masks(scores, k / 64)
    monkeypatch.setattr(masks_module, "natively", lambda _scores: False)
    monkeypatch.setattr("actsparse.core.overlap.natively", lambda _scores: False)
    plain = top_mask(scores, k), row_threshold(scores, k), topk_masks(scores, k / 64)
    for found, expected in zip(compiled, plain, strict=True):
        assert torch.equal(found, expected)


def test_numbers_that_are_none_rank_last_in_masks():
    scores = torch.tensor([[1.0, math.nan, -math.inf, 3.0, -5.0]])
    assert topk_masks(scores, 0.6).tolist() == [[True, False, False, True, True]]
