"""Balanced clustering: sizes always hold, assignment is the cheapest there is, planted groups are found."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.balanced import assign, balanced_kmeans, group_sizes


@pytest.mark.parametrize(("rows", "size", "sizes"), [(96, 32, [32] * 3), (100, 32, [32] * 3 + [4]), (5, 8, [5])])
def test_the_last_group_takes_what_is_left(rows: int, size: int, sizes: list[int]) -> None:
    assert group_sizes(rows, size) == sizes


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_group_has_its_size(rows: int, size: int, seed: int) -> None:
    points = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    sizes = group_sizes(rows, size)
    groups, centres = balanced_kmeans(points, sizes, seed)
    assert groups.bincount(minlength=len(sizes)).tolist() == sizes
    for group in range(len(sizes)):
        assert torch.allclose(centres[group], points[groups == group].mean(dim=0), atol=1e-5)


def test_assignment_is_the_cheapest_of_all() -> None:
    rng = np.random.default_rng(4)
    points, centres, sizes = rng.normal(size=(7, 2)), rng.normal(size=(3, 2)), [3, 3, 1]
    cost = ((points[:, None] - centres[None]) ** 2).sum(-1)

    def total(groups: tuple[int, ...]) -> float:
        return float(sum(cost[i, g] for i, g in enumerate(groups)))

    every = (g for g in itertools.product(range(3), repeat=7) if [g.count(i) for i in range(3)] == sizes)
    assert total(tuple(assign(points, centres, sizes))) == pytest.approx(min(map(total, every)))


def test_planted_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(4, 8, generator=generator)
    truth = torch.arange(4).repeat_interleave(6)[torch.randperm(24, generator=generator)]
    groups, _ = balanced_kmeans(centres[truth] + 0.1 * torch.randn(24, 8, generator=generator), [6] * 4, 0)
    assert len({(int(a), int(b)) for a, b in zip(truth, groups, strict=True)}) == 4


def test_clustering_is_deterministic_and_its_seed_counts() -> None:
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(2))
    one, again, other = (balanced_kmeans(points, [10] * 6, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_equal_rows_are_no_obstacle() -> None:
    assert balanced_kmeans(torch.ones(9, 2), [3] * 3, 0)[0].bincount().tolist() == [3] * 3


def test_sizes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold 5 rows"):
        balanced_kmeans(torch.ones(5, 2), [2, 2], 0)
