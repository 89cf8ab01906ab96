"""HU2: how much of a neuron's firing does the token id leave open? (methods.md, section 5)

Our own definition [I], after MOYU (arXiv 2406.12569). Sink positions (the first four) have been dropped before.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeLabels:
    """Which frequent token type stands at each position (-1: a rare one), and the same labels shuffled over them."""

    types: Int[Tensor, " types"]
    labels: Int[Tensor, " tokens"]
    shuffled: Int[Tensor, " tokens"]


def type_labels(
    tokens: Int[Tensor, " tokens"], *, min_count: int = 50, limit: int | None = None, seed: int = 0
) -> TypeLabels:
    """Labels of the token types with at least `min_count` occurrences, for `count_types`.

    Needs only token ids, so it comes before any activation. `limit` keeps the most frequent types (ties: lower id)
    where types x neurons counts would not fit in memory.
    """
    ids, counts = tokens.cpu().unique(return_counts=True)
    frequent = counts >= min_count
    if limit is not None:
        order = (-counts).argsort(stable=True)
        frequent &= torch.isin(torch.arange(len(ids)), order[:limit])
    types = ids[frequent]
    labels = torch.full(tokens.shape, -1)
    where = torch.isin(tokens.cpu(), types)
    labels[where] = torch.searchsorted(types, tokens.cpu()[where])
    shuffled = labels.clone()
    generator = torch.Generator().manual_seed(seed)
    shuffled[where] = labels[where][torch.randperm(int(where.sum()), generator=generator)]
    return TypeLabels(types=types, labels=labels, shuffled=shuffled)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeCounts:
    """How often each neuron was active at each token type, of how many tokens; counts of two parts merge exactly."""

    active: Int[Tensor, "types neurons"]
    tokens: Int[Tensor, " types"]

    def merge(self, other: "TypeCounts") -> "TypeCounts":
        return TypeCounts(active=self.active + other.active, tokens=self.tokens + other.tokens)


def count_types(masks: Bool[Tensor, "tokens neurons"], labels: Int[Tensor, " tokens"], types: int) -> TypeCounts:
    """Counts of one layer over a batch of tokens with labels 0 .. types-1; tokens labelled -1 are left out."""
    labels = labels.to(masks.device)
    kept = labels >= 0
    active = torch.zeros(types, masks.shape[1], dtype=torch.int32, device=masks.device)
    active.index_add_(0, labels[kept], masks[kept].int())
    return TypeCounts(active=active, tokens=labels[kept].bincount(minlength=types))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyRatio:
    """HU2 of a layer: `value` = `uncorrected` + 1 - `shuffled`, each an entropy-weighted mean of H(M_i|T) / H(M_i).

    `shuffled` is the ratio under shuffled labels, which is 1 but for the bias of finite counts. `value` is None where
    no neuron's firing varies. `entropy` is the mean H(M_i) in nats.
    """

    value: float | None
    uncorrected: float | None
    shuffled: float | None
    entropy: float
    types: int
    tokens: int


def hu2(counts: TypeCounts, shuffled: TypeCounts) -> EntropyRatio:
    """HU2 = sum_i [H(M_i|T) + H(M_i) - H(M_i|T shuffled)] / sum_i H(M_i), with Miller-Madow corrected entropies.

    Equal to the entropy-weighted mean over neurons of H(M_i|T)/H(M_i) less its shuffled-label bias. 0: the token
    decides every neuron; 1: it tells nothing, all is history. Sampling noise may pass either end a little. Our
    definition [I].
    """
    tokens = int(counts.tokens.sum())
    entropy = float(_entropy(counts.active.sum(dim=0), counts.tokens.sum()).sum())
    conditional, scrambled = (_conditional_entropy(part) for part in (counts, shuffled))
    varies = entropy > 0
    return EntropyRatio(
        value=(conditional + entropy - scrambled) / entropy if varies else None,
        uncorrected=conditional / entropy if varies else None,
        shuffled=scrambled / entropy if varies else None,
        entropy=entropy / counts.active.shape[1],
        types=int((counts.tokens > 0).sum()),
        tokens=tokens,
    )


def _conditional_entropy(counts: TypeCounts) -> float:
    """sum_i H(M_i | T) in nats: the entropies within each type, weighted by its share of the tokens."""
    within = _entropy(counts.active, counts.tokens[:, None]).sum(dim=1)
    seen = counts.tokens > 0
    return float((counts.tokens[seen] * within[seen]).sum() / counts.tokens.sum())


def _entropy(active: Tensor, tokens: Tensor) -> Tensor:
    """H of a binary variable in nats, plug-in plus Miller and Madow's (outcomes seen - 1) / (2 tokens)."""
    share = active.double() / tokens
    plug_in = -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share))
    both_seen = (active > 0) & (active < tokens)
    return plug_in + both_seen / (2 * tokens)
