import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.inertia_pairs import inertia_pairs
from actsparse.core.overlap import (
    Chance,
    Overlaps,
    firing_counts,
    mean_chance,
    paired_overlaps,
    pairwise_overlaps,
    popularity_rate,
    squared_sizes,
    topk_masks,
    uniform_rate,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(rows: int, neurons: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(rows, neurons, generator=seeded(seed)) < density


def popularity_of(masks: torch.Tensor) -> torch.Tensor:
    return popularity_rate(firing_counts(masks), squared_sizes(masks)[0])


def kappa_by_hand(first: list[bool], second: list[bool], rate: float) -> float:
    shared = sum(a and b for a, b in zip(first, second, strict=True))
    sizes = sum(first), sum(second)
    if min(sizes) == 0:
        return math.nan
    chance = rate * max(sizes)
    return (shared / min(sizes) - chance) / (1 - chance) if chance < 1 - 1e-6 else math.nan


@pytest.mark.parametrize(
    ("width", "density", "count"),
    [(10, 0.2, 2), (10, 0.25, 3), (10, 0.24, 2), (1536, 0.2, 307), (5, 0.5, 3), (7, 0.0, 1), (7, 1.0, 7), (1, 0.5, 1)],
)
def test_topk_masks_keep_the_rounded_count_and_at_least_one(width, density, count):
    masks = topk_masks(torch.rand(2, 3, width, generator=seeded(0)), density)
    assert (masks.sum(dim=-1) == count).all()


@pytest.mark.parametrize("density", [-0.1, 1.1, 20.0])
def test_a_density_outside_zero_to_one_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        topk_masks(torch.ones(10), density)


@settings(deadline=None, derandomize=True)
@given(
    scores=st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=5),
    density=st.sampled_from([0.1, 0.2, 0.5, 0.8, 1.0]),
)
def test_topk_masks_keep_the_lower_index_of_equal_scores(scores, density):
    masks = topk_masks(torch.tensor(scores, dtype=torch.float32), density)
    for row, mask in zip(scores, masks.tolist(), strict=True):
        ranked = sorted(range(9), key=lambda place: (-row[place], place))
        kept = set(ranked[: max(1, math.floor(density * 9 + 0.5))])
        assert mask == [place in kept for place in range(9)]


def test_nan_scores_are_kept_last():
    masks = topk_masks(torch.tensor([[math.nan, 1.0, 2.0, math.inf], [math.nan, math.nan, 0.0, -1.0]]), 0.5)
    assert masks.tolist() == [[False, False, True, True], [False, False, True, True]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.05, 0.3, 0.9]), rate=st.sampled_from([0.0, 1 / 12, 0.1]))
def test_pairwise_overlaps_agree_with_loops(seed, density, rate):
    rows, columns = random_masks(4, 12, density, seed), random_masks(3, 12, density, seed + 1)
    rows[0] = False
    kappas = pairwise_overlaps(rows, columns).kappa(rate)
    expected = torch.tensor([[kappa_by_hand(a, b, rate) for b in columns.tolist()] for a in rows.tolist()])
    torch.testing.assert_close(kappas, expected, equal_nan=True)
    torch.testing.assert_close(
        paired_overlaps(rows[:3], columns).kappa(rate), expected.diagonal(), equal_nan=True, rtol=1e-5, atol=1e-6
    )


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.1, 0.5, 0.8]))
def test_identical_masks_have_kappa_one_at_any_chance_level(seed, density):
    masks = topk_masks(torch.rand(3, 40, generator=seeded(seed)), density)
    for rate in (0.0, uniform_rate(40), float(popularity_of(masks))):
        kappas = paired_overlaps(masks, masks).kappa(rate)
        assert torch.all(kappas.isnan() | ((kappas - 1).abs() < 1e-5))
    assert not paired_overlaps(masks, masks).kappa(uniform_rate(40)).isnan().any()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.05, 0.2, 0.5]))
def test_independent_random_masks_have_kappa_zero(seed, density):
    scores = torch.rand(2, 400, 100, generator=seeded(seed))
    first, second = topk_masks(scores, density)
    kappas = paired_overlaps(first, second).kappa(uniform_rate(100)).double()
    assert abs(float(kappas.mean())) < 5 * float(kappas.std()) / math.sqrt(400)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_permuting_neurons_changes_nothing(seed):
    masks, order = random_masks(6, 30, 0.4, seed), torch.randperm(30, generator=seeded(seed + 2))
    before = pairwise_overlaps(masks, masks).kappa(popularity_of(masks))
    after = pairwise_overlaps(masks[:, order], masks[:, order]).kappa(popularity_of(masks[:, order]))
    torch.testing.assert_close(before, after, equal_nan=True)


def test_a_static_hot_set_shows_in_kappa_u_and_not_in_kappa_p():
    scores = torch.randn(400, 300, generator=seeded(0))
    scores[:, :30] += 3
    masks = topk_masks(scores, 0.15)
    overlaps = pairwise_overlaps(masks[:200], masks[200:])
    assert float(overlaps.kappa(uniform_rate(300)).mean()) > 0.5
    assert abs(float(overlaps.kappa(popularity_of(masks)).mean())) < 0.01


def test_masks_that_follow_more_than_the_hot_set_show_in_kappa_p():
    scores = torch.randn(400, 300, generator=seeded(0))
    scores[:, :30] += 3
    scores[:200, 30:60] += 3
    scores[200:, 60:90] += 3
    masks = topk_masks(scores, 0.15)
    rate = popularity_of(masks)
    assert float(pairwise_overlaps(masks[:100], masks[100:200]).kappa(rate).mean()) > 0.2
    assert float(pairwise_overlaps(masks[:200], masks[200:]).kappa(rate).mean()) < -0.1


def popularity_by_hand(masks: torch.Tensor) -> float:
    """The mean overlap of two different masks over the mean product of their sizes."""
    pairs = list(itertools.combinations([set(mask.nonzero().flatten().tolist()) for mask in masks], 2))
    return sum(len(a & b) for a, b in pairs) / sum(len(a) * len(b) for a, b in pairs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), tokens=st.sampled_from([2, 3, 9]))
def test_the_popularity_rate_is_the_overlap_of_different_tokens(seed, tokens):
    masks = random_masks(tokens, 25, 0.4, seed)
    assert float(popularity_of(masks)) == pytest.approx(popularity_by_hand(masks))


@pytest.mark.parametrize("tokens", [2, 4, 10, 200])
def test_the_popularity_rate_has_no_bias_however_few_the_tokens(tokens):
    """Tokens drawn from twelve masks of one size: what neurons are how popular is known."""
    scores = torch.rand(12, 80, generator=seeded(1))
    scores[:, :10] += 0.5
    kinds = topk_masks(scores, 0.2)
    shares = kinds.double().mean(dim=0)
    truth = float(shares.square().sum() / shares.sum().square())
    draws = torch.randint(12, (4000 if tokens < 200 else 400, tokens), generator=seeded(tokens))
    counts = torch.stack([firing_counts(kinds[drawn]) for drawn in draws])
    rates = popularity_rate(counts, torch.full((len(draws),), tokens * 16**2))
    error = float(rates.mean()) - truth
    assert abs(error) < 4 * float(rates.std()) / math.sqrt(len(draws))
    plug_in = counts.double().square().sum(dim=1) / counts.sum(dim=1).double().square()
    # p^2 from the same counts, (c / n)^2, is too large by what one token shares with itself
    assert float(plug_in.mean()) - truth == pytest.approx((1 / 16 - truth) / tokens, rel=0.2)


@pytest.mark.parametrize("tokens", [3, 30])
def test_masks_of_several_sizes_have_hardly_any_bias(tokens):
    likely = torch.linspace(0.02, 0.5, 60)
    truth = float(likely.square().sum() / likely.sum().square())
    masks = torch.rand(3000, tokens, 60, generator=seeded(2)) < likely
    rates = torch.stack([popularity_of(drawn) for drawn in masks])
    assert abs(float(rates.mean()) - truth) < 4 * float(rates.std()) / math.sqrt(len(masks)) + 0.002 * truth
    plug_in = torch.stack([(c := firing_counts(drawn).double()).square().sum() / c.sum() ** 2 for drawn in masks])
    assert float(plug_in.mean()) - truth > 0.3 * (1 / float(likely.sum()) - truth) / tokens


def test_equal_popularity_gives_the_uniform_rate():
    masks = torch.eye(50, dtype=torch.bool).roll(1, 0).repeat(40, 1)
    assert float(popularity_of(masks)) == pytest.approx(uniform_rate(50), rel=0.03)
    assert float(popularity_of(torch.ones(3, 50, dtype=torch.bool))) == pytest.approx(uniform_rate(50))


def test_popularity_rate_of_one_hot_neuron_is_one_and_of_fewer_than_two_tokens_undefined():
    assert float(popularity_rate(torch.tensor([0, 5, 0]), torch.tensor(5))) == 1.0
    assert math.isnan(float(popularity_of(torch.zeros(4, 9, dtype=torch.bool))))
    assert math.isnan(float(popularity_of(random_masks(1, 9, 0.5, 0))))


def test_full_masks_leave_nothing_above_chance():
    full = torch.ones(1, 3, dtype=torch.bool)
    assert paired_overlaps(full, full).overlap.tolist() == [1.0]
    # Widths at which width * (1 / width) is just below 1 in float32 are among these.
    widths = torch.arange(1.0, 12_000.0)
    overlaps = Overlaps(overlap=torch.ones_like(widths), sizes=widths[:, None])
    assert overlaps.kappa(1 / widths.double()).isnan().all()


def test_rates_broadcast_over_layers():
    masks = torch.stack([random_masks(4, 20, 0.5, layer) for layer in range(3)])
    rates = torch.tensor([0.0, 0.05, 0.06])
    kappas = pairwise_overlaps(masks, masks).kappa(rates[:, None, None])
    for layer, rate in enumerate(rates.tolist()):
        torch.testing.assert_close(kappas[layer], pairwise_overlaps(masks[layer], masks[layer]).kappa(rate))


def test_firing_counts_add_up():
    masks = random_masks(10, 8, 0.3, 5)
    assert torch.equal(firing_counts(masks), firing_counts(masks[:4]) + firing_counts(masks[4:]))
    assert torch.equal(firing_counts(masks.reshape(2, 5, 8)), firing_counts(masks))
    assert firing_counts(masks).tolist() == [sum(column) for column in zip(*masks.tolist(), strict=True)]


WIDTHS = (30, 20, 40, 30)


def chance_of(masks: torch.Tensor, widths: tuple[int, ...]) -> Chance:
    return Chance.by_popularity(firing_counts(masks), squared_sizes(masks, widths), widths)


def routed_masks(rows: int, seed: int, experts: int = 2) -> torch.Tensor:
    """Masks that keep half of the units of some random experts each, [rows, units]."""
    generator = seeded(seed)
    served = torch.rand(rows, len(WIDTHS), generator=generator).argsort(dim=1) < experts
    parts = [topk_masks(torch.rand(rows, width, generator=generator), 0.5) for width in WIDTHS]
    return torch.cat([part & served[:, [place]] for place, part in enumerate(parts)], dim=1)


class TestChanceOfExperts:
    def test_one_group_is_the_plain_chance(self):
        masks = random_masks(9, 20, 0.4, 0)
        plain = pairwise_overlaps(masks, masks)
        grouped = pairwise_overlaps(masks, masks, (20,))
        for rate, chance in (
            (uniform_rate(20), Chance.uniform((20,))),
            (float(popularity_of(masks)), chance_of(masks, (20,))),
        ):
            torch.testing.assert_close(plain.kappa(rate), grouped.kappa(chance), equal_nan=True)
            assert mean_chance(masks, chance) == pytest.approx(mean_chance(masks, rate))

    def test_it_is_the_mean_overlap_of_masks_drawn_again_in_each_expert(self):
        first, second = routed_masks(1, 1, 3)[0], routed_masks(1, 2, 3)[0]
        pair = paired_overlaps(first[None], second[None], WIDTHS)
        expected = float(pair.chance(Chance.uniform(WIDTHS)))
        drawn = []
        for seed in range(3000):
            parts = [part[torch.randperm(len(part), generator=seeded(seed))] for part in second.split(WIDTHS)]
            drawn.append(float(paired_overlaps(first[None], torch.cat(parts)[None]).overlap))
        assert expected == pytest.approx(sum(drawn) / len(drawn), abs=0.005)

    def test_identical_masks_are_one_and_tokens_without_a_common_expert_zero(self):
        masks = routed_masks(20, 3)
        chance = Chance.uniform(WIDTHS)
        same = paired_overlaps(masks, masks, WIDTHS).kappa(chance)
        assert same.tolist() == pytest.approx([1.0] * 20)
        apart = torch.zeros(2, sum(WIDTHS), dtype=torch.bool)
        apart[0, :15], apart[1, 30:40] = True, True
        assert float(paired_overlaps(apart[:1], apart[1:], WIDTHS).kappa(chance)) == 0.0

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_what_sharing_experts_explains_is_zero(self, seed):
        """Independent masks: without the routing, sharing experts would look like an overlap."""
        masks = routed_masks(300, seed)
        pairs = pairwise_overlaps(masks, masks, WIDTHS)
        others = ~torch.eye(300, dtype=torch.bool)
        assert float(pairs.kappa(Chance.uniform(WIDTHS))[others].mean()) == pytest.approx(0, abs=0.005)
        common = pairs.only(others & (pairs.overlap > 0)).kappa(uniform_rate(sum(WIDTHS)))
        assert float(common.nanmean()) > 0.1

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_neither_the_order_of_neurons_nor_of_experts_matters(self, seed):
        masks = routed_masks(12, seed)
        found = pairwise_overlaps(masks, masks, WIDTHS).kappa(chance_of(masks, WIDTHS))
        experts = torch.randperm(len(WIDTHS), generator=seeded(seed)).tolist()
        parts = masks.split(WIDTHS, dim=1)
        moved = torch.cat(
            [parts[place][:, torch.randperm(WIDTHS[place], generator=seeded(place))] for place in experts], dim=1
        )
        widths = tuple(WIDTHS[place] for place in experts)
        again = pairwise_overlaps(moved, moved, widths).kappa(chance_of(moved, widths))
        torch.testing.assert_close(found, again, equal_nan=True)

    def test_a_hot_set_of_each_expert_is_what_popularity_explains(self):
        hot = torch.cat([torch.arange(width) < width * 2 // 3 for width in WIDTHS])
        generator = seeded(5)
        served = torch.rand(400, len(WIDTHS), generator=generator).argsort(dim=1) < 2
        scores = torch.rand(400, sum(WIDTHS), generator=generator) + 2.0 * hot
        parts = [topk_masks(part, 0.3) & served[:, [at]] for at, part in enumerate(scores.split(WIDTHS, dim=1))]
        masks = torch.cat(parts, dim=1)
        pairs = pairwise_overlaps(masks[:200], masks[200:], WIDTHS)
        assert float(pairs.kappa(Chance.uniform(WIDTHS)).mean()) > 0.05
        by_popularity = chance_of(masks, WIDTHS)
        assert float(pairs.kappa(by_popularity).mean()) == pytest.approx(0, abs=0.005)

    def test_an_expert_that_never_served_has_uniform_chance(self):
        masks = torch.ones(3, sum(WIDTHS), dtype=torch.bool)
        masks[:, 30:50] = False
        assert chance_of(masks, WIDTHS).rates.tolist() == pytest.approx([1 / width for width in WIDTHS])

    def test_pairs_of_texts_use_the_same_chance(self):
        masks = routed_masks(2 * 20, 7).view(2, 20, -1)
        chance = chance_of(masks, WIDTHS)
        tokens = torch.arange(40).view(2, 20)
        (found,) = inertia_pairs(masks, tokens, [chance])
        kappas = pairwise_overlaps(masks[0], masks[1], WIDTHS).kappa(chance)
        equal = float(found.kappas.equal_sum[0, 1] / found.kappas.equal_count[0, 1])
        assert equal == pytest.approx(float(kappas.diagonal().mean()), abs=1e-6)
