"""The decode phase of a profile: what the model itself writes after each prompt, greedily and in batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.errors import DataError
from actsparse.models.load import LoadedModel

# Sequences as they are fed, and the first position of each that counts.
Fed = tuple[list[Int[Tensor, " tokens"]], list[int]]


def prompts_of(reader: TextReader, sequences: Sequences, new_tokens: int, max_positions: int | None) -> Sequences:
    """What is continued: whole prompts, or the first P tokens of a corpus' blocks; those with room for more only.

    Raises DataError where no prompt leaves room for a token.
    """
    limit = len(sequences.ids[0]) if sequences.record.block_length is None else reader.prompt_length
    ids = sequences.ids if sequences.record.block_length is None else tuple(one[:limit] for one in sequences.ids)
    fitting = [i for i, one in enumerate(ids) if max_positions is None or len(one) < max_positions]
    if not fitting:
        raise DataError(
            f"no prompt leaves room for a generated token in the model's context of {max_positions}",
            "give shorter prompts, or leave out --decode",
        )
    if len(fitting) < len(ids):
        reader.notify(f"{len(ids) - len(fitting)} prompts fill the model's context: nothing is generated after them")
    short = sum(max_positions is not None and len(ids[i]) + new_tokens > max_positions for i in fitting)
    if short:
        reader.notify(f"{short} prompts have room for fewer than {new_tokens} new tokens: as many as fit")
    return Sequences(tuple(ids[i] for i in fitting), replace(sequences.record, role="decode"))


def continuing(loaded: LoadedModel, new_tokens: int) -> Callable[[Sequence[Int[Tensor, " tokens"]]], Fed]:
    """How a batch of prompts is fed: each with the tokens that the model writes after it, which alone count."""

    def feed(prompts: Sequence[Int[Tensor, " tokens"]]) -> Fed:
        written = greedy(loaded, prompts, new_tokens)
        return [torch.cat(pair) for pair in zip(prompts, written, strict=True)], [len(ids) for ids in prompts]

    return feed


@torch.no_grad()
def greedy(
    loaded: LoadedModel, prompts: Sequence[Int[Tensor, " tokens"]], new_tokens: int
) -> list[Int[Tensor, " new"]]:
    """The model's own greedy continuations, at most `new_tokens` each, up to its end of text (left out)."""
    longest = max(len(ids) for ids in prompts)
    limit = loaded.record.max_positions
    room = new_tokens if limit is None else min(new_tokens, limit - longest)
    if room < new_tokens and len(prompts) > 1:
        # how much fits after a prompt must not depend on the others
        return [one for ids in prompts for one in greedy(loaded, [ids], new_tokens)]
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    stop = loaded.model.generation_config.eos_token_id if loaded.model.generation_config else None
    ends: list[int] = [stop] if isinstance(stop, int) else [*(stop or ())]
    settings = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    found = loaded.model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), generation_config=settings
    )
    return [_until_end(row, ends) for row in found[:, longest:].cpu()]


def _until_end(written: Int[Tensor, " new"], ends: list[int]) -> Int[Tensor, " new"]:
    stops = torch.isin(written, torch.tensor(ends, dtype=written.dtype)).nonzero().flatten()
    return written[: int(stops[0])] if len(stops) else written
