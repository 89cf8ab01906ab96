import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.inertia import (
    layer_bands,
    semantics_ratio,
    sentence_masks,
    sentence_matrices,
    si2,
    spread_blocks,
)
from actsparse.core.inertia_pairs import InertiaPairs, inertia_pairs
from actsparse.core.overlap import (
    MIN_ROOM,
    firing_counts,
    paired_overlaps,
    popularity_rate,
    squared_sizes,
    topk_masks,
    uniform_rate,
)
from actsparse.core.prefixes import layer_prefix_masks, prefix_masks, prefix_overlaps, si1

NEURONS = 120
UNIFORM = uniform_rate(NEURONS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steered_masks(sequences: int, positions: int, pull: float, seed: int = 0, hot: float = 0.0) -> torch.Tensor:
    """Top-20 % masks that share a preference within a sequence (`pull`) and a hot set everywhere (`hot`)."""
    noise = torch.randn(sequences, positions, NEURONS, generator=seeded(seed))
    own = torch.randn(sequences, 1, NEURONS, generator=seeded(seed + 1))
    shared = (torch.arange(NEURONS) < 20).float()
    return topk_masks(noise + pull * own + hot * shared, 0.2)


def fresh_tokens(sequences: int, positions: int) -> torch.Tensor:
    return torch.arange(sequences * positions).reshape(sequences, positions)


def kappa_by_hand(first: list[bool], second: list[bool], rate: float) -> float:
    sizes = sum(first), sum(second)
    if min(sizes) == 0:
        return math.nan
    overlap = sum(a and b for a, b in zip(first, second, strict=True)) / min(sizes)
    return (overlap - rate * max(sizes)) / (1 - rate * max(sizes))


def kappas_of(masks: torch.Tensor, tokens: torch.Tensor, rates: list[float]) -> list[InertiaPairs]:
    return [pairs.kappas for pairs in inertia_pairs(masks, tokens, rates)]


class TestPrefix:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_prefix_masks_agree_with_the_statistic_computed_alone(self, seed):
        activations = torch.randn(10, 15, generator=seeded(seed), dtype=torch.float64)
        activations[2] = 0.0
        found = prefix_masks(activations, [1, 3, 10], 0.3)
        for mask, prefix in zip(found, [1, 3, 10], strict=True):
            rows = [row / row.norm() for row in activations[:prefix] if row.norm() > 0]
            statistic = (sum(row**2 for row in rows) / len(rows)).sqrt()
            assert torch.equal(mask, topk_masks(statistic, 0.3))

    def test_a_prefix_without_usable_rows_gives_an_empty_mask(self):
        activations = torch.randn(6, 15, generator=seeded(0))
        activations[:2] = 0.0
        assert prefix_masks(activations, [1, 2, 3, 6, 7], 0.2).sum(dim=1).tolist() == [0, 0, 3, 3, 0]

    def test_no_single_token_outweighs_the_others(self):
        activations = torch.ones(10, 20)
        activations[:9, :4] = 2.0
        activations[9, 10:14] = 1e6
        assert prefix_masks(activations, [10], 0.2)[0].nonzero().flatten().tolist() == [0, 1, 2, 3]

    def test_overlaps_stand_at_their_distance(self):
        activations = torch.randn(12, 15, generator=seeded(1))
        masks = topk_masks(activations.abs(), 0.3)
        prefixes = (1, 4, 8, 16)
        found = prefix_overlaps(activations, masks, 0.3, prefixes=prefixes, max_delta=6)
        first = prefix_masks(activations, prefixes, 0.3)
        for row, prefix in enumerate(prefixes):
            for delta in range(1, 7):
                value = float(found.kappa(1 / 15)[row, delta - 1])
                # The first `prefix` tokens are positions 0 .. prefix-1; token P + delta is position P + delta - 1.
                position = prefix + delta - 1
                if position < 12:
                    expected = float(paired_overlaps(first[row], masks[position]).kappa(1 / 15))
                    assert value == pytest.approx(expected, abs=1e-6)
                else:
                    assert math.isnan(value)


class TestSI1:
    def test_the_curve_is_the_mean_over_distances_and_sequences(self):
        kappas = torch.rand(2, 3, 4, 5, generator=seeded(0))
        kappas[:, :, 3, 2:] = math.nan
        found = si1(kappas, prefixes=(1, 2, 4, 8))
        for place in range(4):
            assert found.curve[place].layers[1].value == pytest.approx(float(kappas[1, :, place].nanmean()))
        assert found.curve[0].mean.n == 3

    def test_p90_is_the_first_prefix_that_reaches_nine_tenths(self):
        curve = torch.tensor([[0.1, 0.5, 0.91, 1.0], [0.95, 0.2, 0.3, 1.0], [-0.1, -0.2, 0.0, -0.1]])
        kappas = curve[:, None, :, None].expand(3, 2, 4, 6)
        found = si1(kappas, prefixes=(1, 2, 4, 8))
        assert found.p90 == (4, 1, None)
        assert found.p90_mean == 8

    def test_a_prefix_longer_than_the_text_is_left_out(self):
        kappas = torch.full((1, 2, 3, 4), 0.5)
        kappas[:, :, 2] = math.nan
        found = si1(kappas, prefixes=(1, 2, 4))
        assert found.curve[2].mean.value is None
        assert found.p90 == (1,)

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_permuting_neurons_changes_nothing(self, seed):
        activations = torch.randn(40, 25, generator=seeded(seed))
        order = torch.randperm(25, generator=seeded(seed + 1))
        plain, moved = (
            prefix_overlaps(rows, topk_masks(rows.abs(), 0.2), 0.2, prefixes=(1, 8, 32), max_delta=8)
            for rows in (activations, activations[:, order])
        )
        torch.testing.assert_close(moved.overlap, plain.overlap, equal_nan=True)

    def test_a_prefix_that_is_all_there_is_has_the_masks_of_its_tokens(self):
        """Identical tokens: whatever the prefix, its mask is theirs, and kappa 1."""
        rows = torch.randn(1, 30, generator=seeded(3)).expand(20, 30)
        found = prefix_overlaps(rows, topk_masks(rows.abs(), 0.2), 0.2, prefixes=(1, 4), max_delta=4)
        assert found.kappa(1 / 30).flatten().tolist() == pytest.approx([1.0] * 8)

    @pytest.mark.parametrize("density", [0.2, 0.5])
    def test_a_prefix_of_sparse_tokens_keeps_no_more_than_they_do(self, density):
        """Independent tokens of a ReLU model, 7 % of them active: one tells nothing of the next, above popularity."""
        likely = torch.linspace(0.02, 0.12, 1000)
        active = torch.rand(200, 1000, generator=seeded(5)) < likely
        activations = torch.rand(200, 1000, generator=seeded(6)) * active
        masks = topk_masks(activations, density) & (activations > 0)
        overlaps = prefix_overlaps(activations, masks, density, prefixes=(1, 8), max_delta=150)
        kappas = overlaps.kappa(popularity_rate(firing_counts(masks), squared_sizes(masks)[0]).item())
        assert kappas[0].mean().item() == pytest.approx(0, abs=0.02)
        assert not kappas[1].isnan().any()
        first, longer = layer_prefix_masks(activations, masks, (1, 8), density)
        assert torch.equal(first, masks[0])
        assert longer.sum().item() == math.floor(masks[:8].sum().item() / 8 + 0.5)

    def test_a_token_that_is_not_finite_makes_no_prefix_smaller(self):
        activations = torch.randn(4, 20, generator=seeded(7))
        activations[1] = math.nan
        masks = topk_masks(activations.abs(), 0.2) & (activations.abs() > 0)
        assert layer_prefix_masks(activations, masks, (1, 2, 4), 0.2).sum(dim=1).tolist() == [4, 4, 4]

    def test_a_steady_preference_is_found_from_enough_tokens(self):
        kappas = []
        for seed in range(4):
            own = torch.randn(NEURONS, generator=seeded(seed)).exp()
            activations = own * torch.randn(200, NEURONS, generator=seeded(seed + 50))
            masks = topk_masks(activations.abs(), 0.2)
            overlaps = prefix_overlaps(activations, masks, 0.2, prefixes=(1, 4, 16, 64), max_delta=100)
            kappas.append(overlaps.kappa(UNIFORM))
        found = si1(torch.stack(kappas)[None], prefixes=(1, 4, 16, 64))
        values = [point.mean.value or 0 for point in found.curve]
        assert values == sorted(values)
        assert values[-1] > values[0] + 0.1
        assert found.p90_mean in (16, 64)


class TestSI2:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_pair_sums_agree_with_loops(self, seed):
        masks = torch.rand(3, 7, 12, generator=seeded(seed)) < 0.3
        tokens = torch.randint(4, (3, 7), generator=seeded(seed + 1))
        rates = (0.0, 1 / 12, 0.12)
        for rate, found in zip(rates, inertia_pairs(masks, tokens, rates, min_gap=3), strict=True):
            rows, ids = masks.tolist(), tokens.tolist()
            kappas, chances = (
                {name: torch.zeros(3, 3, 2, dtype=torch.float64) for name in ("within", "equal", "apart")}
                for _ in range(2)
            )
            for s, r, i, j in itertools.product(range(3), range(3), range(7), range(7)):
                kappa = kappa_by_hand(rows[s][i], rows[r][j], rate)
                if ids[s][i] == ids[r][j] or math.isnan(kappa):
                    continue
                chance = rate * max(sum(rows[s][i]), sum(rows[r][j]))
                for by_kind, value in ((kappas, kappa), (chances, chance)):
                    # masks so large that chance alone makes them overlap have no kappa
                    if by_kind is kappas and chance > 1 - MIN_ROOM:
                        continue
                    pair = torch.tensor([value, 1.0], dtype=torch.float64)
                    if s == r and j - i >= 3:
                        by_kind["within"][s, s] += pair
                    if s != r and i == j:
                        by_kind["equal"][s, r] += pair
                    if s != r and abs(i - j) >= 3:
                        by_kind["apart"][s, r] += pair
            for by_kind, part in ((kappas, found.kappas), (chances, found.expected)):
                sums = torch.stack([part.within_sum, part.within_count], dim=1)
                torch.testing.assert_close(sums, by_kind["within"].diagonal().mT, rtol=1e-6, atol=1e-5)
                for name in ("equal", "apart"):
                    both = torch.stack([getattr(part, f"{name}_sum"), getattr(part, f"{name}_count")], dim=-1)
                    torch.testing.assert_close(both, by_kind[name], rtol=1e-6, atol=1e-5)

    def test_w_b_and_j_are_means_over_pairs(self):
        masks, tokens = steered_masks(4, 20, 0.5), torch.randint(9, (4, 20), generator=seeded(3))
        found = si2(kappas_of(masks, tokens, [0.0]))
        rows, ids = masks.tolist(), tokens.tolist()
        within, between = [], []
        for s in range(4):
            for r in range(s, 4):
                for i in range(20):
                    for j in range(20):
                        if ids[s][i] != ids[r][j] and (s == r or i == j):
                            overlap = kappa_by_hand(rows[s][i], rows[r][j], 0.0)
                            if s == r and j - i >= 8:
                                within.append(overlap)
                            if s != r and i == j:
                                between.append(overlap)
        w, b = sum(within) / len(within), sum(between) / len(between)
        assert found.within.mean.value == pytest.approx(w, abs=1e-6)
        assert found.between.mean.value == pytest.approx(b, abs=1e-6)
        assert found.excess.mean.value == pytest.approx(w - b, abs=1e-6)

    def test_identical_masks_give_one(self):
        masks = steered_masks(1, 1, 0.0).expand(3, 20, -1)
        found = si2(kappas_of(masks, fresh_tokens(3, 20), [UNIFORM]))
        for part in (found.within, found.between, found.between_apart):
            assert part.mean.value == pytest.approx(1, abs=1e-5)
        assert found.excess.mean.value == pytest.approx(0, abs=1e-5)

    def test_independent_masks_give_zero_within_the_interval(self):
        masks = steered_masks(8, 60, 0.0)
        found = si2(kappas_of(masks, fresh_tokens(8, 60), [UNIFORM]))
        assert found.within.mean.value == pytest.approx(0, abs=0.01)
        for part in (found.within, found.between_apart, found.excess):
            assert part.mean.touches(0.0)

    def test_a_static_hot_set_is_no_excess_and_no_kappa_p(self):
        masks = steered_masks(8, 60, 0.0, hot=3.0)
        rate = float(popularity_rate(firing_counts(masks), squared_sizes(masks)[0]))
        plain, corrected = (si2([pairs]) for pairs in kappas_of(masks, fresh_tokens(8, 60), [UNIFORM, rate]))
        assert plain.within.mean.value is not None
        assert plain.within.mean.value > 0.4
        assert corrected.within.mean.value == pytest.approx(0, abs=0.02)
        assert plain.excess.mean.value == pytest.approx(0, abs=0.02)

    def test_a_preference_of_each_text_is_excess(self):
        found = si2(kappas_of(steered_masks(8, 60, 1.0), fresh_tokens(8, 60), [UNIFORM]))
        assert found.excess.mean.value is not None
        assert found.excess.mean.value > 0.2
        assert not found.excess.mean.touches(0.0)
        assert found.between.mean.value == pytest.approx(found.between_apart.mean.value, abs=0.03)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_permuting_neurons_changes_nothing(self, seed):
        masks = steered_masks(3, 20, 0.5, seed)
        order = torch.randperm(NEURONS, generator=seeded(seed))
        tokens = fresh_tokens(3, 20)
        before, after = (si2(kappas_of(rows, tokens, [UNIFORM])) for rows in (masks, masks[..., order]))
        assert after.excess.mean.value == pytest.approx(before.excess.mean.value)

    def test_one_repeated_token_has_no_pairs(self):
        found = si2(kappas_of(steered_masks(3, 20, 0.5), torch.zeros(3, 20, dtype=torch.long), [UNIFORM]))
        for part in (found.within, found.between, found.between_apart, found.excess):
            assert part.mean.value is None
            assert part.mean.low is None

    @pytest.mark.parametrize(
        ("blocks", "chosen"),
        [
            (80, [0, 10, 20, 30, 40, 50, 60, 70]),
            (23, [0, 2, 4, 6, 8, 10, 12, 14]),
            (8, list(range(8))),
            (3, [0, 1, 2]),
            (0, []),
        ],
    )
    def test_blocks_are_spread_over_the_file(self, blocks, chosen):
        assert spread_blocks(blocks) == chosen


class TestSemanticsRatio:
    @staticmethod
    def pairs(pull: float, seed: int) -> tuple[InertiaPairs, ...]:
        return kappas_of(steered_masks(8, 40, pull, seed), fresh_tokens(8, 40), [UNIFORM])

    def test_equal_excess_has_ratio_one(self):
        found = semantics_ratio(self.pairs(1.0, 0), self.pairs(1.0, 10))
        assert found.value == pytest.approx(1, abs=0.15)
        assert found.touches(1.0)

    def test_excess_that_needs_meaning_has_ratio_zero(self):
        found = semantics_ratio(self.pairs(0.0, 0), self.pairs(1.0, 10))
        assert found.value == pytest.approx(0, abs=0.1)
        assert found.touches(0.0)

    def test_it_is_a_ratio_of_layer_means(self):
        meaningless, natural = (
            [pairs for seed in seeds for pairs in self.pairs(pull, seed)]
            for pull, seeds in ((0.5, (0, 1)), (1.0, (10, 11)))
        )
        means = [si2(rung).excess.mean.value or math.nan for rung in (meaningless, natural)]
        assert semantics_ratio(meaningless, natural).value == pytest.approx(means[0] / means[1])

    def test_no_natural_excess_has_no_ratio(self):
        found = semantics_ratio(self.pairs(1.0, 0), self.pairs(0.0, 10))
        assert (found.value, found.low, found.high) == (None, None, None)


class TestSentences:
    def test_a_sentence_has_the_mask_of_its_tokens_and_an_empty_one_none(self):
        rows = [torch.randn(size, 15, generator=seeded(size)) for size in (5, 0, 3)]
        masks = sentence_masks(rows, [row != 0 for row in rows], 0.2)
        assert masks.sum(dim=1).tolist() == [3, 0, 3]
        assert torch.equal(masks[2], prefix_masks(rows[2], [3], 0.2)[0])

    def test_identical_sentences_are_one_and_unrelated_ones_zero(self):
        same = steered_masks(1, 1, 0.0).expand(3, 6, -1)
        assert sentence_matrices(same, UNIFORM).similarity.mean.value == pytest.approx(1, abs=1e-5)
        unrelated = steered_masks(6, 40, 0.0)
        found = sentence_matrices(unrelated, torch.full((6,), UNIFORM))
        assert found.similarity.mean.value == pytest.approx(0, abs=0.01)
        assert found.similarity.mean.touches(0.0)

    def test_permuting_neurons_changes_nothing(self):
        masks = steered_masks(3, 5, 0.5)
        order = torch.randperm(masks.shape[-1], generator=seeded(1))
        plain, moved = (sentence_matrices(of, UNIFORM) for of in (masks, masks[..., order]))
        torch.testing.assert_close(moved.early, plain.early, equal_nan=True)
        assert moved.similarity.mean == plain.similarity.mean

    def test_bands_are_means_over_their_layers(self):
        masks = steered_masks(4, 5, 0.3)
        found = sentence_matrices(masks, UNIFORM)
        kappas = [[[float(paired_overlaps(a, b).kappa(UNIFORM)) for b in rows] for a in rows] for rows in masks]
        expected = torch.tensor(kappas, dtype=torch.float64)
        torch.testing.assert_close(found.early, expected[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.middle, expected[1], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.late, expected[2:].mean(dim=0), atol=1e-6, rtol=0)
        off = expected[2:].mean(dim=0)[~torch.eye(5, dtype=torch.bool)]
        assert found.bands[2].value == pytest.approx(float(off.mean()), abs=1e-6)

    def test_an_empty_sentence_is_left_out_of_the_mean(self):
        masks = steered_masks(1, 1, 0.0).expand(1, 4, -1).clone()
        masks[0, 1] = False
        found = sentence_matrices(masks, UNIFORM)
        assert found.early[1].isnan().all()
        assert found.similarity.mean.value == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize(
        ("layers", "bands"),
        [
            (30, ((0, 10), (10, 20), (20, 30))),
            (32, ((0, 10), (10, 21), (21, 32))),
            (2, ((0, 1), (0, 1), (1, 2))),
            (1, ((0, 1), (0, 1), (0, 1))),
        ],
    )
    def test_layers_split_into_thirds(self, layers, bands):
        assert layer_bands(layers) == bands
