"""Texts as token sequences: prompts one by one, a corpus as blocks of equal length."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actsparse.data.chat import as_text
from actsparse.data.prompts import Prompt, read_text
from actsparse.errors import DataError
from actsparse.results import TextRecord

WINDOW = 16
WINDOW_SHARE = 32
MAX_WINDOWS = 4096
CHANCE_SHARE = 0.02


@dataclass(frozen=True)
class Sequences:
    """Token id sequences (1-D int64 tensors) and the record of the text that they came from."""

    ids: tuple[Tensor, ...]
    record: TextRecord

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    def take(self, chosen: Sequence[int], blocks: tuple[int, int] | None = None) -> "Sequences":
        """The sequences at the places `chosen`, with a record of exactly these."""
        ids = tuple(self.ids[i] for i in chosen)
        return Sequences(ids, replace(_count(self.record, ids), blocks=blocks))

    def stack(self) -> Tensor:
        """Blocks of equal length as one tensor [blocks, block_length]."""
        return torch.stack(self.ids)


def from_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    source: str,
    role: str,
    sink_tokens: int = 4,
    notify: Callable[[str], None],
) -> Sequences:
    """One sequence a prompt, with the tokenizer's own special tokens; longer than the context: split, and said so."""
    ids: list[Tensor] = []
    plain = sum(bool(prompt.messages) for prompt in prompts) if not tokenizer.chat_template else 0
    if plain:
        share = f"{plain} of {len(prompts)}"
        notify(f"prompts with chat messages: {share}; this model has no chat template: read as plain text")
    for prompt, tokens in zip(prompts, _tokens(prompts, tokenizer), strict=True):
        if not tokens:
            notify(f"{prompt.source}: no tokens; left out")
            continue
        limit = max_length or len(tokens)
        if len(tokens) > limit:
            pieces = -(-len(tokens) // limit)
            notify(f"{prompt.source}: {len(tokens)} tokens, over the model's {limit}; split into {pieces} sequences")
        ids.extend(torch.tensor(tokens[start : start + limit]) for start in range(0, len(tokens), limit))
    record = TextRecord(role=role, source=source, sha256="", sequences=0, tokens=0, sink_tokens=sink_tokens)
    return Sequences(tuple(ids), _count(record, ids))


def blocks_of(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_length: int,
    prompt_length: int,
    source: str,
    role: str,
    sink_tokens: int = 4,
) -> Sequences:
    """Consecutive blocks of a text (methods.md, section 1): tokenised once, last partial block dropped.

    BOS stands in front of each block if and only if the tokenizer's own call adds one; then a block holds
    `block_length - 1` tokens of the text.
    """
    text = text.replace("\r\n", "\n")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    step = block_length - len(bos)
    ids = tuple(torch.tensor([*bos, *tokens[start : start + step]]) for start in range(0, len(tokens) - step + 1, step))
    if not ids:
        raise DataError(
            f"{source} has {len(tokens)} tokens, too few for one block of {block_length}",
            f"give more text, or shorter blocks: --block-length {max(8, len(tokens) // 2)}",
        )
    record = TextRecord(
        role=role,
        source=source,
        sha256="",
        sequences=0,
        tokens=0,
        block_length=block_length,
        prompt_length=prompt_length,
        blocks=(0, len(ids)),
        sink_tokens=sink_tokens,
    )
    return Sequences(ids, _count(record, ids))


def read_corpus(path: str) -> tuple[str, str]:
    """The text of a corpus file and its name; raises DataError where it cannot be read."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no file {file}", "check the path given with --corpus or --calib")
    return read_text(file), file.name


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own call puts BOS in front."""
    ids = tokenizer("x").input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def window_hashes(sequences: Sequence[Tensor]) -> tuple[str, ...]:
    """A sample of the 16-token windows of the sequences, the same for equal windows wherever they stand.

    Two texts that share a passage of about 100 tokens or more share some of these hashes.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, WINDOW, dtype=np.uint64) | np.uint64(1)
    found: set[int] = set()
    for ids in sequences:
        if len(ids) < WINDOW:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids.numpy().astype(np.uint64), WINDOW)
        hashed = (windows * weights).sum(axis=1, dtype=np.uint64)
        hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        found.update(hashed[(hashed >> np.uint64(32)) % np.uint64(WINDOW_SHARE) == 0].tolist())
    return tuple(f"{value:016x}" for value in sorted(found)[:MAX_WINDOWS])


def shares_text(first: TextRecord, second: TextRecord) -> bool:
    """Whether two texts have passages in common: over 2 % of the sampled windows of the smaller one.

    Fewer are phrases that any two parts of a text of its kind share (headings, formulas).
    """
    mine, theirs = set(first.window_hashes), set(second.window_hashes)
    return len(mine & theirs) > CHANCE_SHARE * min(len(mine), len(theirs))


def _tokens(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of every prompt; chat messages go through the model's template, which writes its special tokens."""
    chats = [prompt for prompt in prompts if prompt.messages] if tokenizer.chat_template else []
    texts = iter(as_text(chats, tokenizer) if chats else ())
    for prompt in prompts:
        if prompt.messages and tokenizer.chat_template:
            yield list(tokenizer(next(texts), add_special_tokens=False, verbose=False).input_ids)
        else:
            yield list(tokenizer(prompt.content, verbose=False).input_ids)


def _count(record: TextRecord, ids: Sequence[Tensor]) -> TextRecord:
    digest = hashlib.sha256()
    for one in ids:
        digest.update(len(one).to_bytes(8, "little") + one.numpy().tobytes())
    return replace(
        record,
        sha256=digest.hexdigest(),
        sequences=len(ids),
        tokens=sum(len(one) for one in ids),
        window_hashes=window_hashes(ids),
    )
