import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.batch_union import batch_union


def bernoulli(shares: torch.Tensor, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, len(shares), generator=torch.Generator().manual_seed(seed)) < shares


def own_sequence_each(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)


def test_the_union_of_one_token_is_its_density_and_of_all_tokens_all_that_ever_fire():
    masks = bernoulli(torch.linspace(0.0, 0.4, 50), 12)
    found = batch_union(masks, own_sequence_each(12), max_batch=12, draws=400)
    assert found.measured[0] == pytest.approx(float(masks.float().mean()), abs=0.01)
    assert found.measured[-1] == pytest.approx(float(masks.any(dim=0).float().mean()))
    assert len(found.measured) == len(found.independent) == len(found.uniform) == 12


def test_the_predictions_are_their_formulas():
    masks = bernoulli(torch.linspace(0.0, 0.4, 5), 40)
    found = batch_union(masks, own_sequence_each(40), max_batch=3)
    shares = [sum(column) / 40 for column in zip(*masks.tolist(), strict=True)]
    density = sum(shares) / 5
    for batch in (1, 2, 3):
        assert found.independent[batch - 1] == pytest.approx(sum(1 - (1 - share) ** batch for share in shares) / 5)
        assert found.uniform[batch - 1] == pytest.approx(1 - (1 - density) ** batch)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_independent_tokens_reach_the_independent_union(seed):
    found = batch_union(bernoulli(torch.full((300,), 0.1), 2000, seed), own_sequence_each(2000), seed=seed)
    for batch in (1, 8, 64):
        assert found.measured[batch - 1] == pytest.approx(found.independent[batch - 1], abs=0.02)
        assert found.measured[batch - 1] == pytest.approx(found.uniform[batch - 1], abs=0.02)


def test_a_hot_set_keeps_the_union_below_the_uniform_prediction():
    shares = torch.full((200,), 0.001)
    shares[:20] = 0.95
    found = batch_union(bernoulli(shares, 1000), own_sequence_each(1000))
    assert found.measured[31] == pytest.approx(found.independent[31], abs=0.02)
    assert found.measured[31] < 0.2 < 0.9 < found.uniform[31]


def test_tokens_that_fire_together_stay_below_the_independent_prediction():
    groups = torch.arange(1000) % 2
    masks = torch.zeros(1000, 100, dtype=torch.bool)
    masks[groups == 0, :50] = True
    masks[groups == 1, 50:] = True
    found = batch_union(masks, own_sequence_each(1000), draws=200)
    assert found.measured[0] == pytest.approx(0.5)
    assert found.measured[1] == pytest.approx(0.75, abs=0.06)
    correlated = batch_union(masks, groups, draws=50)
    assert correlated.measured[1] == 1.0
    assert correlated.sequences == 2


def test_a_batch_takes_another_token_of_a_sequence_only_when_sequences_run_out():
    sequences = torch.tensor([0] * 50 + [1] * 3 + [2])
    masks = torch.nn.functional.one_hot(sequences, 3).bool()
    found = batch_union(masks, sequences, max_batch=5, draws=100)
    assert found.measured == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_the_union_grows_and_does_not_depend_on_the_order_of_neurons(seed):
    masks = bernoulli(torch.rand(30, generator=torch.Generator().manual_seed(seed)), 20, seed)
    sequences = torch.arange(20) // 4
    found = batch_union(masks, sequences, max_batch=10, seed=seed)
    assert list(found.measured) == sorted(found.measured)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    assert batch_union(masks[:, order], sequences, max_batch=10, seed=seed).measured == pytest.approx(found.measured)


def test_batches_end_at_the_number_of_tokens():
    assert len(batch_union(bernoulli(torch.full((4,), 0.5), 7), own_sequence_each(7)).measured) == 7
