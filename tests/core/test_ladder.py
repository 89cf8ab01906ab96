from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.ladder import (
    Rung,
    input_ladder,
    ordinary_ids,
    random_tokens,
    repeated,
    sentence_ends,
    sentence_shuffled,
    token_shuffled,
)


def text(sequences: int, positions: int, seed: int, vocabulary: int = 30) -> torch.Tensor:
    return torch.randint(vocabulary, (sequences, positions), generator=torch.Generator().manual_seed(seed))


def test_a_sentence_ends_after_a_token_whose_text_ends_in_its_mark():
    texts = ["Hi", ".", " end.", "?!", "...", '."', " .\n", "", "!"]
    assert sentence_ends(texts).tolist() == [False, True, True, True, True, False, False, False, True]


def test_ordinary_ids_leave_out_special_ones():
    assert ordinary_ids(6, [0, 5, 3, 99]).tolist() == [1, 2, 4]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), sequences=st.integers(1, 4), positions=st.integers(1, 40))
def test_every_rung_has_the_same_shape_and_first_four_tokens(seed, sequences, positions):
    tokens = text(sequences, positions, seed)
    before = tokens.clone()
    ladder = input_ladder(tokens, tokens % 7 == 0, ordinary_ids(30, [1]), seed=seed)
    assert list(ladder) == list(Rung)
    for rung in ladder.values():
        assert rung.shape == tokens.shape
        assert rung.dtype == tokens.dtype
        assert torch.equal(rung[:, :4], tokens[:, :4])
    assert torch.equal(ladder[Rung.NATURAL], before)
    assert torch.equal(tokens, before)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_shuffles_keep_the_tokens_of_each_sequence(seed):
    tokens = text(3, 50, seed)
    for rung in (token_shuffled(tokens, seed=seed), sentence_shuffled(tokens, tokens < 5, seed=seed)):
        assert torch.equal(rung.sort(dim=1).values, tokens.sort(dim=1).values)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_sentence_shuffling_keeps_sentences_whole(seed):
    tokens = torch.arange(60)[None, :]
    ends = torch.rand(1, 60, generator=torch.Generator().manual_seed(seed)) < 0.2
    rung = sentence_shuffled(tokens, ends, seed=seed)[0].tolist()
    # Ids are positions: a jump in the shuffled text may only follow a sentence end, or the unfinished last sentence.
    jumps = [now for now, following in pairwise(rung[4:]) if following != now + 1]
    assert all(bool(ends[0, now]) or now == 59 for now in jumps)
    assert sorted(rung) == list(range(60))


def test_shuffles_do_shuffle():
    tokens = torch.arange(80).reshape(1, 80)
    ends = (tokens % 10) == 9
    assert not torch.equal(sentence_shuffled(tokens, ends), tokens)
    assert not torch.equal(token_shuffled(tokens), tokens)
    assert not torch.equal(token_shuffled(tokens, seed=1), token_shuffled(tokens, seed=2))


def test_one_sentence_stays_as_it_is():
    tokens = text(2, 20, 0)
    assert torch.equal(sentence_shuffled(tokens, torch.zeros(2, 20, dtype=torch.bool)), tokens)


def test_unigram_random_follows_the_frequencies_and_uniform_random_the_list():
    tokens = torch.full((20, 504), 3)
    tokens[:, 4::5] = 8
    ladder = input_ladder(tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.tensor([10, 11, 12, 13]))
    unigram, uniform = ladder[Rung.UNIGRAM_RANDOM][:, 4:], ladder[Rung.UNIFORM_RANDOM][:, 4:]
    assert float((unigram == 8).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert set(unigram.unique().tolist()) == {3, 8}
    assert uniform.flatten().bincount()[10:].tolist() == pytest.approx([2500] * 4, rel=0.1)
    assert set(uniform.unique().tolist()) == {10, 11, 12, 13}


def test_repeat_is_one_token_in_all_sequences():
    rung = repeated(torch.tensor([[9, 9, 9, 9, 5, 6, 6], [9, 9, 9, 9, 5, 7, 1]]))
    assert rung[:, 4:].tolist() == [[5, 5, 5], [5, 5, 5]]


def test_a_sequence_draws_the_same_whichever_others_are_there():
    tokens = text(4, 30, 7)
    assert torch.equal(token_shuffled(tokens, seed=3)[:2], token_shuffled(tokens[:2], seed=3))
    pool = torch.arange(100)
    assert torch.equal(random_tokens(tokens, pool, seed=3)[:2], random_tokens(tokens[:2], pool, seed=3))
    rows = token_shuffled(torch.arange(40).expand(2, 40), seed=3)
    assert not torch.equal(rows[0], rows[1])
