"""The input ladder: texts of equal length that lose order, then meaning, step by step (methods.md section 6).

Every rung keeps the first four tokens of every sequence, BOS included, because what stands there (the attention sink)
changes all later activations. Rungs draw per sequence: a sequence's rung does not depend on which others are there.
Our definition [I], after MOYU's "random words".
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

SINK_TOKENS = 4
SENTENCE_ENDS = (".", "!", "?")


class Rung(StrEnum):
    NATURAL = "natural"
    SENTENCE_SHUFFLED = "sentence-shuffled"
    TOKEN_SHUFFLED = "token-shuffled"
    UNIGRAM_RANDOM = "unigram-random"
    UNIFORM_RANDOM = "uniform-random"
    REPEAT = "repeat"


def sentence_ends(texts: Sequence[str]) -> Bool[Tensor, " tokens"]:
    """Which tokens end a sentence: those whose text ends in . ! or ?."""
    return torch.tensor([text.endswith(SENTENCE_ENDS) for text in texts], dtype=torch.bool)


def ordinary_ids(vocabulary: int, special: Sequence[int]) -> Int[Tensor, " ids"]:
    """The token ids 0 .. vocabulary-1 without the special ones, ascending: what uniform-random draws from."""
    return torch.tensor(sorted(set(range(vocabulary)) - set(special)), dtype=torch.long)


def input_ladder(
    tokens: Int[Tensor, "sequences positions"],
    ends: Bool[Tensor, "sequences positions"],
    ordinary: Int[Tensor, " ids"],
    *,
    seed: int = 0,
) -> dict[Rung, Int[Tensor, "sequences positions"]]:
    """All six rungs of the same sequences, each [sequences, positions].

    `ends` marks the tokens that end a sentence; `ordinary` are the ids that uniform-random may draw. unigram-random
    draws from the tokens themselves, all sequences pooled.
    """
    pool = tokens[:, SINK_TOKENS:].flatten()
    return {
        Rung.NATURAL: tokens.clone(),
        Rung.SENTENCE_SHUFFLED: sentence_shuffled(tokens, ends, seed=seed),
        Rung.TOKEN_SHUFFLED: token_shuffled(tokens, seed=seed),
        Rung.UNIGRAM_RANDOM: random_tokens(tokens, pool, seed=seed),
        Rung.UNIFORM_RANDOM: random_tokens(tokens, ordinary, seed=seed),
        Rung.REPEAT: repeated(tokens),
    }


def sentence_shuffled(
    tokens: Int[Tensor, "sequences positions"],
    ends: Bool[Tensor, "sequences positions"],
    *,
    seed: int = 0,
) -> Int[Tensor, "sequences positions"]:
    """The sentences of each sequence in random order, each whole; an unfinished last one counts as a sentence."""
    rung = tokens.clone()
    for row, random in enumerate(_generators(Rung.SENTENCE_SHUFFLED, len(tokens), seed)):
        cuts = (ends[row, SINK_TOKENS:].nonzero().flatten() + 1).tolist()
        sentences = [part for part in tokens[row, SINK_TOKENS:].tensor_split(cuts) if part.numel()]
        if sentences:
            rung[row, SINK_TOKENS:] = torch.cat([sentences[place] for place in random.permutation(len(sentences))])
    return rung


def token_shuffled(tokens: Int[Tensor, "sequences positions"], *, seed: int = 0) -> Int[Tensor, "sequences positions"]:
    """The tokens of each sequence in random order."""
    rung = tokens.clone()
    for row, random in enumerate(_generators(Rung.TOKEN_SHUFFLED, len(tokens), seed)):
        rest = tokens[row, SINK_TOKENS:]
        rung[row, SINK_TOKENS:] = rest[torch.from_numpy(random.permutation(rest.numel())).to(tokens.device)]
    return rung


def random_tokens(
    tokens: Int[Tensor, "sequences positions"], pool: Int[Tensor, " draws"], *, seed: int = 0
) -> Int[Tensor, "sequences positions"]:
    """Tokens drawn from `pool` with replacement: a text's tokens give unigram-random, a list of ids uniform-random."""
    rung = tokens.clone()
    for row, random in enumerate(_generators(Rung.UNIGRAM_RANDOM, len(tokens), seed)):
        drawn = torch.from_numpy(random.integers(pool.numel(), size=rung[row, SINK_TOKENS:].numel()))
        rung[row, SINK_TOKENS:] = pool[drawn.to(pool.device)].to(tokens.device, tokens.dtype)
    return rung


def repeated(tokens: Int[Tensor, "sequences positions"]) -> Int[Tensor, "sequences positions"]:
    """One token over and over, the same in all sequences: their most frequent one (the lower id of equals)."""
    rung = tokens.clone()
    rest = tokens[:, SINK_TOKENS:]
    if rest.numel():
        ids, counts = rest.unique(return_counts=True)
        rung[:, SINK_TOKENS:] = ids[counts == counts.max()].min()
    return rung


def _generators(rung: Rung, sequences: int, seed: int) -> list[np.random.Generator]:
    place = list(Rung).index(rung)
    return [np.random.default_rng((seed, place, row)) for row in range(sequences)]
