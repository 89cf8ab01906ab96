"""Sequences in batches: padded on the right or on the left, with the positions of each that count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

BATCH_TOKENS = 2048

PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Padded sequences: input_ids and attention_mask [batch, seq]; each one's own ids, the first of its positions that
    counts, and the column in which it begins (0 where padding stands on the right)."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    sequences: tuple[Int[Tensor, " tokens"], ...]
    starts: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def position_ids(self) -> Int[Tensor, "batch seq"] | None:
        """Where every token stands in its own sequence (padding: 0); None where its column says so."""
        if not any(self.columns):
            return None
        return (self.attention_mask.cumsum(dim=1) - 1).clamp_min(0)

    @property
    def padded(self) -> bool:
        return any(len(ids) < self.input_ids.shape[1] for ids in self.sequences)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    @property
    def spans(self) -> list[tuple[int, slice]]:
        """(row of the batch, positions in its sequence that count) of every sequence that has any."""
        pairs = enumerate(zip(self.sequences, self.starts, strict=True))
        return [(row, slice(start, len(ids))) for row, (ids, start) in pairs if len(ids) > start]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """The same on a device. A GPU is not waited for: the next batch is prepared while it is at work on this one."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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


def padded(sequences: Sequence[Int[Tensor, " tokens"]], starts: Sequence[int], side: PaddingSide = "right") -> Batch:
    """One batch of these sequences."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side=side)
    width = ids.shape[1]
    columns = tuple(width - len(one) if side == "left" else 0 for one in sequences)
    begins = torch.tensor(columns)[:, None]
    ends = begins + torch.tensor([len(one) for one in sequences])[:, None]
    places = torch.arange(width)[None]
    return Batch(ids, ((places >= begins) & (places < ends)).long(), tuple(sequences), tuple(starts), columns)
