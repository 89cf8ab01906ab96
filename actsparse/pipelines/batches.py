"""Sequences in batches: padded on the right, with the positions of each that count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: input_ids and attention_mask [batch, seq]; each one's own ids, and the first of
    its positions that counts."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    sequences: tuple[Int[Tensor, " tokens"], ...]
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    @property
    def spans(self) -> list[tuple[int, slice]]:
        """(row of the batch, positions that count) of every sequence that has any."""
        pairs = enumerate(zip(self.sequences, self.starts, strict=True))
        return [(row, slice(start, len(ids))) for row, (ids, start) in pairs if len(ids) > start]


def groups(lengths: Sequence[int], batch_size: int | None) -> Iterator[list[int]]:
    """The places of the sequences of each batch, the longest sequences first: alike ones need little padding, and what
    memory a run needs it needs at once."""
    group: list[int] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        longest = max(longest, length)
        full = len(group) == batch_size if batch_size else longest * (len(group) + 1) > BATCH_TOKENS
        if group and full:
            yield group
            group, longest = [], length
        group.append(place)
    if group:
        yield group


def padded(sequences: Sequence[Int[Tensor, " tokens"]], starts: Sequence[int]) -> Batch:
    """One batch of these sequences."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(one) for one in sequences])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return Batch(ids, mask, tuple(sequences), tuple(starts))
