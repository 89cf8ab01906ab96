import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from actsparse.core.bootstrap import Interval, layered_ratio
from actsparse.core.variance_shares import FactorLevels, VarianceSums, factor_levels, variance_shares, variance_sums

NAMES = ("neuron", "sequence", "token_type", "position", "residual")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(sequences: int, positions: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (sequences, positions), generator=seeded(seed))


def shares_of(sums: VarianceSums) -> list[float]:
    found = variance_shares(sums)
    return [getattr(found, name).share for name in NAMES]


def shares_by_least_squares(activations: torch.Tensor, levels: FactorLevels) -> list[float]:
    rows = activations.double().numpy()
    y = np.log(1e-4 + np.abs(rows) / np.linalg.norm(rows, axis=1, keepdims=True))
    design = np.ones((len(y), 1))
    squares = [((y - y.mean()) ** 2).sum(), ((y - y.mean(axis=0)) ** 2).sum()]
    for level, size in (
        (levels.sequence, levels.sequences),
        (levels.token_type, levels.types),
        (levels.position, levels.position_bins),
    ):
        design = np.concatenate([design, level.numpy()[:, None] == np.arange(size)], axis=1)
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        squares.append(((y - design @ solution) ** 2).sum())
    steps = [earlier - later for earlier, later in pairwise(squares)]
    return [step / squares[0] for step in [*steps, squares[-1]]]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), min_count=st.sampled_from([1, 8, 1000]))
def test_shares_agree_with_nested_least_squares(seed, min_count):
    levels = factor_levels(text(3, 40, 12, seed), min_count=min_count, position_bins=4)
    activations = torch.randn(120, 6, generator=seeded(seed + 1))
    found = shares_of(variance_sums(activations, levels))
    assert found == pytest.approx(shares_by_least_squares(activations, levels), abs=1e-9)
    assert sum(found) == pytest.approx(1)


def test_sums_are_added_in_a_fixed_order():
    """On a GPU additions by index go in the order of threads, so that two runs would differ in the last bits."""

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    with Operators() as used:
        variance_sums(torch.randn(120, 6, generator=seeded(0)), factor_levels(text(3, 40, 12, 0)))
    assert any("mm" in name for name in used.names)
    assert not [name for name in used.names if "index_add" in name or "scatter_add" in name]


def effects(size: int, seed: int) -> torch.Tensor:
    """Effects of `size` levels on 400 neurons, without a part that the mean over the levels would explain."""
    drawn = torch.randn(size, 400, generator=seeded(seed))
    centred = drawn - drawn.mean(dim=0 if size > 1 else 1, keepdim=True)
    return centred / centred.square().mean().sqrt()


@pytest.mark.parametrize(
    "scales",
    [(1.0, 0.5, 0.8, 0.3, 0.6), (1.0, 0.0, 0.0, 0.0, 1.0), (0.5, 1.0, 0.0, 0.0, 0.2), (0.0, 0.0, 1.0, 0.5, 0.5)],
)
def test_planted_shares_are_recovered(scales):
    levels = factor_levels(text(8, 256, 10, 0), position_bins=8)
    neuron, sequence, token, position, noise = (
        0.3 * scale * effects(size, place)
        for place, (scale, size) in enumerate(zip(scales, (1, 8, 10, 8, 2048), strict=True))
    )
    # Small effects keep the norm of a token, which is divided out, close to a constant.
    log_sizes = neuron + sequence[levels.sequence] + token[levels.token_type] + position[levels.position] + noise
    found = shares_of(variance_sums(log_sizes.exp(), levels))
    total = sum(scale**2 for scale in scales)
    assert found == pytest.approx([scale**2 / total for scale in scales], abs=0.02)


def test_without_an_effect_a_factor_takes_its_chance_share():
    levels = factor_levels(text(8, 128, 20, 0))
    found = variance_shares(variance_sums(torch.randn(1024, 200, generator=seeded(1)), levels))
    assert found.sequence.degrees == 7
    assert found.token_type.degrees == 19
    assert found.position.degrees == 7
    assert found.residual.degrees == 1024 - 1 - 7 - 19 - 7
    for factor in (found.sequence, found.token_type, found.position):
        assert factor.share == pytest.approx(factor.chance, rel=0.1)


def test_a_token_determined_activation_leaves_no_residual():
    tokens = text(4, 100, 5, 0)
    levels = factor_levels(tokens)
    activations = torch.randn(5, 30, generator=seeded(1))[tokens.flatten()]
    found = variance_shares(variance_sums(activations, levels))
    assert found.residual.share == pytest.approx(0, abs=1e-9)
    assert found.token_type.share is not None
    assert found.token_type.share > 0.5


def test_an_earlier_factor_takes_what_it_shares_with_a_later_one():
    tokens = torch.tensor([[0] * 20, [1] * 20])
    activations = torch.randn(2, 30, generator=seeded(1))[tokens.flatten()]
    found = variance_shares(variance_sums(activations, factor_levels(tokens, position_bins=2)))
    assert found.sequence.share is not None
    assert found.sequence.share > 0.1
    assert found.token_type.share == pytest.approx(0, abs=1e-9)
    assert found.token_type.degrees == 0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 79))
def test_sums_merge_and_neither_scale_sign_nor_order_of_neurons_matters(seed, cut):
    levels = factor_levels(text(2, 40, 4, seed))
    activations = torch.randn(80, 7, generator=seeded(seed))
    whole = shares_of(variance_sums(activations, levels))
    first = variance_sums(activations[:cut], levels.rows(0, cut))
    second = variance_sums(activations[cut:], levels.rows(cut, 80))
    assert shares_of(first.merge(second)) == pytest.approx(whole, abs=1e-9)
    order = torch.randperm(7, generator=seeded(seed))
    assert shares_of(variance_sums(-3 * activations[:, order], levels)) == pytest.approx(whole, abs=1e-5)


def test_sums_of_other_levels_do_not_merge():
    activations = torch.randn(80, 3, generator=seeded(0))
    two, four = (variance_sums(activations, factor_levels(text(rows, 80 // rows, 4, 0))) for rows in (2, 4))
    with pytest.raises(ValueError, match="levels differ"):
        two.merge(four)


def test_zero_and_broken_rows_are_skipped():
    levels = factor_levels(text(2, 40, 4, 0))
    activations = torch.randn(80, 7, generator=seeded(0))
    activations[5] = 0.0
    activations[50, 2] = math.nan
    activations[51, 2] = math.inf
    found = variance_shares(variance_sums(activations, levels))
    assert found.tokens == 77
    assert found.residual.share is not None
    kept = [row for row in range(80) if row not in (5, 50, 51)]
    parts = [variance_sums(activations[row : row + 1], levels.rows(row, row + 1)) for row in kept]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert shares_of(merged) == pytest.approx([getattr(found, name).share for name in NAMES], abs=1e-9)


def test_levels_number_types_in_order_of_their_ids_and_pool_rare_ones():
    tokens = torch.tensor([[7, 7, 3, 5], [3, 7, 9, 3]])
    levels = factor_levels(tokens, min_count=3, position_bins=2)
    assert levels.token_type.tolist() == [1, 1, 0, -1, 0, 1, -1, 0]
    assert levels.sequence.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert levels.position.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert (levels.sequences, levels.types, levels.position_bins) == (2, 2, 2)


def test_nothing_that_varies_has_no_shares():
    levels = factor_levels(text(2, 10, 3, 0))
    found = variance_shares(variance_sums(torch.ones(20, 4), levels))
    assert found.neuron.share is None
    assert found.sequence.chance is None


class TestBySequence:
    def test_sequences_share_out_the_squares_of_one_fit(self):
        tokens = text(4, 40, 12, 0)
        levels = factor_levels(tokens, position_bins=4)
        activations = torch.randn(160, 6, generator=seeded(1))
        parts = [variance_sums(activations[at : at + 40], levels.rows(at, at + 40)) for at in range(0, 160, 40)]
        found, whole = variance_shares(*parts), variance_shares(variance_sums(activations, levels))
        assert found.squares.shape == (4,)
        for name in NAMES:
            mine, all_at_once = getattr(found, name), getattr(whole, name)
            assert mine.share == pytest.approx(all_at_once.share, abs=1e-9)
            assert float(mine.squares.sum() / found.squares.sum()) == pytest.approx(mine.share, abs=1e-9)
        residuals = shares_by_least_squares(activations, levels)[4] * float(whole.squares.sum())
        assert float(found.residual.squares.sum()) == pytest.approx(residuals)

    def test_what_a_sequence_adds_is_what_its_weight_changes(self):
        """A sequence that counts a little more moves the shares as its squares say."""
        levels = factor_levels(text(4, 50, 5, 2), position_bins=4)
        drawn = torch.randn(4, 50, 20, generator=seeded(3)).exp() * torch.randn(4, 1, 20, generator=seeded(4)).exp()
        rows = [variance_sums(drawn[at], levels.rows(50 * at, 50 * at + 50)) for at in range(4)]
        plain, moved = variance_shares(*rows), variance_shares(scaled(rows[0], 1.02), *rows[1:])
        weights = torch.tensor([1.02, 1, 1, 1], dtype=torch.float64)
        for name in NAMES:
            before, after = getattr(plain, name), getattr(moved, name)
            predicted = float((weights * before.squares).sum() / (weights * plain.squares).sum())
            assert after.share - before.share == pytest.approx(predicted - before.share, rel=0.05, abs=2e-6), name

    def test_intervals_cover_a_planted_inertia(self):
        """Half of the texts on average keep a pattern of their own, the others none; 24 of them tell how much."""

        def shares(seed: int) -> tuple[float, Interval]:
            keeps = torch.rand(24, 1, 1, generator=seeded(seed)) < 0.5
            own = torch.randn(24, 1, 30, generator=seeded(seed + 1)) * keeps
            rows = (own + torch.randn(24, 40, 30, generator=seeded(seed + 2))).exp()
            levels = factor_levels(text(24, 40, 4, seed), position_bins=4)
            found = variance_shares(*(variance_sums(rows[at], levels.rows(40 * at, 40 * at + 40)) for at in range(24)))
            squares = layered_ratio(found.sequence.squares[None], found.squares[None], resamples=300)
            return float(found.sequence.share or 0), squares.mean

        drawn = [shares(10 * run) for run in range(80)]
        truth = sum(value for value, _ in drawn) / len(drawn)
        held = sum((one.low or 0) <= truth <= (one.high or 0) for _, one in drawn)
        assert truth > 0.2
        assert 0.86 <= held / len(drawn) <= 1.0
        assert all(0.02 < (one.high or 0) - (one.low or 0) < 0.4 for _, one in drawn)


def scaled(sums: VarianceSums, weight: float) -> VarianceSums:
    return VarianceSums(
        gram=weight * sums.gram, cross=weight * sums.cross, square=weight * sums.square, factors=sums.factors
    )
