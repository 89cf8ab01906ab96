"""HU2: how much of a neuron's firing does the token id leave open? (methods.md, section 5)

Our own definition [I], after MOYU (arXiv 2406.12569). Sink positions (the first four) have been dropped before.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.bootstrap import RESAMPLES, LayerIntervals, layered_ratio


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

    @property
    def untyped(self) -> "TypeCounts":
        """The same as if all tokens were of one type."""
        return TypeCounts(active=self.active.sum(dim=0, keepdim=True), tokens=self.tokens.sum(dim=0, keepdim=True))


def count_types(masks: Bool[Tensor, "tokens neurons"], labels: Int[Tensor, " tokens"], types: int) -> TypeCounts:
    """Counts of one layer over a batch of tokens with labels 0 .. types-1; tokens labelled -1 are left out."""
    labels = labels.to(masks.device)
    kept = labels >= 0
    active = torch.zeros(types, masks.shape[1], dtype=torch.int32, device=masks.device)
    active.index_add_(0, labels[kept], masks[kept].int())
    return TypeCounts(active=active, tokens=labels[kept].bincount(minlength=types))


def code_length(part: TypeCounts, whole: TypeCounts) -> float:
    """What the masks of some tokens take, in nats, summed over neurons, in the code that is the best for all tokens.

    Firing with share p_i among the tokens of a type costs -log p_i there, silence -log(1 - p_i), and every token its
    part of Miller and Madow's correction, (outcomes seen - 1) / 2 a type and neuron. Of all tokens this is
    tokens * sum_i H(M_i | T). The code being the best, what a sequence takes in it is, to first order, what the
    sequence adds to the entropies: so intervals over sequences need no code for every resample.

    Where the part shows what the whole never does (rounding may flip a marginal neuron between two passes over a text)
    it costs as if that had been seen half a time, instead of infinitely much.
    """
    known = whole.tokens.clamp(min=1)[:, None]
    share = whole.active.double() / known
    silent = part.tokens[:, None] - part.active
    disagree = ((share == 0) & (part.active > 0)) | ((share == 1) & (silent > 0))
    share = torch.where(disagree, share.clamp(min=0.5 / known, max=1 - 0.5 / known), share)
    spent = -(torch.special.xlogy(part.active, share) + torch.special.xlogy(silent, 1 - share)).sum()
    both_seen = (whole.active > 0) & (whole.active < whole.tokens[:, None])
    correction = (part.tokens * both_seen.sum(dim=1) / (2 * known.flatten())).sum()
    return float(spent + correction)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLengths:
    """Nats of every layer and sequence by what the code knows: the token type, a shuffled one, nothing."""

    typed: Float[Tensor, "layers sequences"]
    shuffled: Float[Tensor, "layers sequences"]
    untyped: Float[Tensor, "layers sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyRatio:
    """HU2: `value` = `uncorrected` + 1 - `shuffled`, each an entropy-weighted mean of H(M_i|T) / H(M_i).

    `shuffled` is the ratio under shuffled labels, which is 1 but for the bias of finite counts. Values are None where
    no neuron's firing varies.
    """

    value: LayerIntervals
    uncorrected: LayerIntervals
    shuffled: LayerIntervals


def hu2(lengths: CodeLengths, *, resamples: int = RESAMPLES, seed: int = 0) -> EntropyRatio:
    """HU2 = sum_i [H(M_i|T) + H(M_i) - H(M_i|T shuffled)] / sum_i H(M_i), with Miller-Madow corrected entropies.

    Equal to the entropy-weighted mean over neurons of H(M_i|T)/H(M_i) less its shuffled-label bias. 0: the token
    decides every neuron; 1: it tells nothing, all is history. Sampling noise may pass either end a little. Sequences
    are resampled, linearised (`code_length`). Our definition [I].
    """
    value, uncorrected, shuffled = (
        layered_ratio(nats, lengths.untyped, resamples=resamples, seed=seed)
        for nats in (lengths.typed + lengths.untyped - lengths.shuffled, lengths.typed, lengths.shuffled)
    )
    return EntropyRatio(value=value, uncorrected=uncorrected, shuffled=shuffled)
