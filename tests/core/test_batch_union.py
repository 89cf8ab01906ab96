from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.batch_union import batch_union, layer_unions, union_blocks


def bernoulli(shares: torch.Tensor, sequences: int, tokens: int = 1, seed: int = 0) -> torch.Tensor:
    """How often independent tokens fire, [sequences, neurons]."""
    drawn = torch.rand(sequences, tokens, len(shares), generator=torch.Generator().manual_seed(seed)) < shares
    return drawn.sum(dim=1)


def test_the_union_is_that_of_all_batches_one_by_one():
    masks = torch.rand(3, 3, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    found = batch_union(masks.sum(dim=1), 3, max_batch=9)
    for batch in range(1, 10):
        rounds, left = divmod(batch, 3)
        unions = [
            masks[[place for place, taken in enumerate(tokens) for _ in taken], [t for taken in tokens for t in taken]]
            .any(dim=0)
            .float()
            .mean()
            for again in combinations(range(3), left)
            for tokens in product(*(combinations(range(3), rounds + (place in again)) for place in range(3)))
        ]
        assert found.measured[batch - 1] == pytest.approx(float(torch.stack(unions).mean())), batch


def test_the_union_of_one_token_is_its_density_and_of_all_tokens_all_that_ever_fire():
    fired = bernoulli(torch.linspace(0.0, 0.4, 50), 12)
    found = batch_union(fired, 1, max_batch=12)
    assert found.measured[0] == pytest.approx(float(fired.float().mean()))
    assert found.measured[-1] == pytest.approx(float(fired.any(dim=0).float().mean()))
    assert len(found.measured) == len(found.independent) == len(found.uniform) == 12


def test_the_predictions_are_their_formulas():
    fired = bernoulli(torch.linspace(0.0, 0.4, 5), 40)
    found = batch_union(fired, 1, max_batch=3)
    shares = [sum(column) / 40 for column in zip(*fired.tolist(), strict=True)]
    density = sum(shares) / 5
    for batch in (1, 2, 3):
        assert found.independent[batch - 1] == pytest.approx(sum(1 - (1 - share) ** batch for share in shares) / 5)
        assert found.uniform[batch - 1] == pytest.approx(1 - (1 - density) ** batch)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_independent_tokens_reach_the_independent_union(seed):
    found = batch_union(bernoulli(torch.full((300,), 0.1), 100, 20, seed), 20)
    for batch in (1, 8, 64):
        assert found.measured[batch - 1] == pytest.approx(found.independent[batch - 1], abs=0.02)
        assert found.measured[batch - 1] == pytest.approx(found.uniform[batch - 1], abs=0.02)


def test_a_hot_set_keeps_the_union_below_the_uniform_prediction():
    shares = torch.full((200,), 0.001)
    shares[:20] = 0.95
    found = batch_union(bernoulli(shares, 100, 10), 10)
    assert found.measured[31] == pytest.approx(found.independent[31], abs=0.02)
    assert found.measured[31] < 0.2 < 0.9 < found.uniform[31]


def test_sequences_that_never_meet_need_what_each_of_them_needs():
    halves = torch.zeros(2, 100, dtype=torch.long)
    halves[0, :50] = 7
    halves[1, 50:] = 7
    found = batch_union(halves, 7)
    assert found.measured[:2] == pytest.approx((0.5, 1.0))
    assert found.independent[1] == pytest.approx(0.75)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_the_union_grows_and_does_not_depend_on_the_order_of_neurons(seed):
    fired = bernoulli(torch.rand(30, generator=torch.Generator().manual_seed(seed)), 5, 4, seed)
    found = batch_union(fired, 4, max_batch=10)
    assert list(found.measured) == sorted(found.measured)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    assert batch_union(fired[:, order], 4, max_batch=10).measured == pytest.approx(found.measured)


def test_batches_end_at_the_number_of_tokens():
    assert len(batch_union(bernoulli(torch.full((4,), 0.5), 7), 1).measured) == 7


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 100, 127, 128, 1000])
def test_blocks_reach_over_all_of_the_text(blocks):
    chosen = union_blocks(blocks, 64)
    assert len(chosen) == len(set(chosen)) == min(blocks, 64)
    gaps = [later - earlier for earlier, later in pairwise([*chosen, blocks])]
    assert chosen[0] == 0
    assert max(gaps) - min(gaps) <= 1


class TestInterval:
    def test_what_a_sequence_contributes_is_told_by_leaving_it_out(self):
        fired = bernoulli(torch.linspace(0.05, 0.6, 30), 9, 5)
        found = batch_union(fired, 5, max_batch=9)
        for batch in (1, 2, 5, 8):
            assert float(found.by_sequence[batch - 1].mean()) == pytest.approx(found.measured[batch - 1])
        without = batch_union(fired[torch.arange(9) != 4], 5, max_batch=5)
        assert float(found.by_sequence[4, 4]) == pytest.approx(9 * found.measured[4] - 8 * without.measured[4])
        assert found.by_sequence[8].isnan().all()

    def test_sequences_that_are_alike_leave_no_width_and_one_unlike_the_others_a_wide_one(self):
        same = bernoulli(torch.full((400,), 0.3), 1, 6).expand(12, 400)
        unlike = same.clone()
        unlike[0] = 6
        narrow, wide = (layer_unions([batch_union(fired, 6)])[3].mean for fired in (same, unlike))
        assert narrow.low == pytest.approx(narrow.value)
        assert narrow.high == pytest.approx(narrow.value)
        assert wide.high - wide.low > 0.05
        assert wide.n == 12

    def test_it_covers_the_union_of_all_texts(self):
        """Texts of one of many topics, each with neurons of its own: 95 % intervals of 24 texts hold the truth."""
        generator = torch.Generator().manual_seed(0)
        topics = torch.rand(500, 60, generator=generator).square()
        missed = 1 - topics
        # two texts of different topics, drawn from all of them
        truth = 1 - float(((missed.sum(dim=0).square() - missed.square().sum(dim=0)) / (500 * 499)).mean())
        held = 0
        for _ in range(200):
            chosen = topics[torch.randperm(500, generator=generator)[:24]]
            fired = (torch.rand(24, 40, 60, generator=generator) < chosen[:, None]).sum(dim=1)
            pair = layer_unions([batch_union(fired, 40, max_batch=2)], resamples=400)[1].mean
            held += pair.low <= truth <= pair.high
        assert 0.88 <= held / 200 <= 0.99

    @pytest.mark.parametrize("sequences", [1, 4])
    def test_a_batch_of_all_sequences_has_none(self, sequences: int):
        found = layer_unions([batch_union(bernoulli(torch.full((9,), 0.5), sequences, 8), 8, max_batch=sequences)])
        assert found[-1].mean.low is found[-1].mean.stderr is None
        assert found[-1].mean.value is not None
