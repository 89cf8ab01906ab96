"""Sampled documents on disk: uint16 token shards of at most 16 MiB, in the source model's vocabulary.

A document is `prompt ids, IM_START, answer ids, IM_END`; neither marker occurs inside.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

IM_START, IM_END = 1, 2
SHARD_TOKENS = 8_000_000  # 15.3 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    prompt: str
    answer: str


def write_shards(folder: Path, documents: list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]) -> int:
    """How many shards now hold the (prompt ids, answer ids) of `documents`."""
    start, end = np.array([IM_START], np.uint16), np.array([IM_END], np.uint16)
    parts = [np.concatenate([prompt, start, answer, end]) for prompt, answer in documents]
    tokens = np.concatenate(parts)
    shards = range(0, len(tokens), SHARD_TOKENS)
    for index, first in enumerate(shards):
        np.save(folder / f"shard_{index:02d}.npy", tokens[first : first + SHARD_TOKENS])
    return len(shards)


def read_shards(folder: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents in `folder`, in order; the last one, if cut off, is left out."""
    tokens = np.concatenate([np.load(path) for path in sorted(folder.glob("shard_*.npy"))])
    ends = np.flatnonzero(tokens == IM_END)
    pieces = [piece[:-1] for piece in np.split(tokens, ends + 1)[:-1]]
    halves = [_halves(piece) for piece in pieces]
    prompts = tokenizer.decode_batch([prompt for prompt, _ in halves])
    answers = tokenizer.decode_batch([answer for _, answer in halves])
    for prompt, answer in zip(prompts, answers, strict=True):
        yield Document(prompt=prompt.strip(), answer=answer.strip())


def _halves(piece: NDArray[np.uint16]) -> tuple[list[int], list[int]]:
    middle = int(np.flatnonzero(piece == IM_START)[0])
    return piece[:middle].tolist(), piece[middle + 1 :].tolist()
