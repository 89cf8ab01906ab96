"""How many neurons a decode step of a batch needs at all: the union of its tokens' masks (methods.md section 6).

Neuron sparsity pays in a batch only while the union stays small. Our definition [I].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchUnion:
    """Share of neurons (0..1) that at least one of B tokens uses, for B = 1 .. len(measured).

    `measured[B-1]`: mean over the draws. `independent`: mean_i 1 - (1 - p_i)^B, tokens drawn independently from
    neurons as popular as these. `uniform`: 1 - (1 - p)^B with p the mean density, as if all neurons were equally
    popular. Measured below independent: tokens of a batch share more than the hot set. Independent below uniform:
    the hot set is what keeps the union small. Beyond B = `sequences` a batch holds several tokens of one sequence.
    """

    measured: tuple[float, ...]
    independent: tuple[float, ...]
    uniform: tuple[float, ...]
    tokens: int
    sequences: int
    draws: int


def batch_union(
    masks: Bool[Tensor, "tokens neurons"],
    sequences: Int[Tensor, " tokens"],
    *,
    max_batch: int = 64,
    draws: int = 32,
    seed: int = 0,
) -> BatchUnion:
    """The measured union density of batches of 1 .. max_batch tokens of one layer, against two predictions.

    `sequences` says which sequence each token comes from. A batch takes one random token of each of B random
    sequences, as a server that decodes B requests at different positions; only when sequences run out does it take a
    second token of each, and so on. B ends at the number of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = sequences.cpu()
    largest = min(max_batch, masks.shape[0])
    orders = torch.stack([_round_robin(labels, generator)[:largest] for _ in range(draws)]).to(masks.device)
    union = torch.zeros(draws, masks.shape[1], dtype=torch.bool, device=masks.device)
    measured = []
    for position in range(largest):
        union |= masks[orders[:, position]]
        measured.append(float(union.float().mean()))
    popularity = masks.double().mean(dim=0)
    batches = range(1, largest + 1)
    return BatchUnion(
        measured=tuple(measured),
        independent=tuple(float((1 - (1 - popularity) ** batch).mean()) for batch in batches),
        uniform=tuple(float(1 - (1 - popularity.mean()) ** batch) for batch in batches),
        tokens=masks.shape[0],
        sequences=int(labels.unique().numel()),
        draws=draws,
    )


def _round_robin(labels: Tensor, generator: torch.Generator) -> Tensor:
    """All tokens in random order, first one of every sequence, then a second one of every sequence, and so on."""
    shuffled = torch.randperm(labels.numel(), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    _, sizes = labels[grouped].unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rounds = torch.arange(labels.numel()) - starts
    again = torch.randperm(labels.numel(), generator=generator)
    return grouped[again][rounds[again].argsort(stable=True)]
