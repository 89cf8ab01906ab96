"""History-related activation uncertainty: how far a token alone decides which neurons fire (methods.md section 5).

    HU1   the same token after different histories: how different are its masks?
    HU2   how much of a neuron's firing does the token id leave open?
    HU4   the recursion of MOYU: does what mattered so far tell what matters now?
    M2    the root cause: the sign of a * dL/da on active neurons

HU1 and HU2 are our own definitions [I] of what MOYU (arXiv 2406.12569) describes; HU4 measures that paper's recursion.
Everywhere the sink positions (the first four) have been dropped before, except where a docstring says otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from actsparse.core.bootstrap import (
    RESAMPLES,
    LayerIntervals,
    layer_intervals,
    layered_ratio,
    resample_weights,
    stratified_weights,
    weighted_pair_means,
)
from actsparse.core.overlap import paired_overlaps, pairwise_overlaps
from actsparse.errors import DataError

CONTEXT_LENGTH = 64
CONTEXT_TYPES = 8
CONTEXTS_PER_TYPE = 8
SINK_TOKENS = 4
DIVERSITY_BINS = 5

# A chance rate (`core.overlap`): one for all layers, or one each.
Rates = float | Float[Tensor, " layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryContexts:
    """Texts that end in the same few token types, to be fed alone, one per row and grouped by type.

    `tokens` are as fed: `length` corpus tokens, after BOS where there is one. `types` is the last token of each row,
    `ends` where that token stands in the stream.
    """

    tokens: Int[Tensor, "contexts fed"]
    types: Int[Tensor, " contexts"]
    ends: Int[Tensor, " contexts"]
    length: int

    @property
    def overlapping(self) -> Bool[Tensor, "contexts contexts"]:
        """Which pairs of contexts share text of the stream."""
        return (self.ends[:, None] - self.ends[None, :]).abs() < self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryControls:
    """The controls of HU1, as fed. All keep the first four fed tokens and the last one of their context.

    `other_token`: each type after each history of the first type, [types, histories, fed]. `shuffled` and `random`
    replace the history of every context, row by row: its tokens in random order, or random tokens of the stream.
    `none` is the first four tokens and the type, nothing between. The identical context is the context itself, fed
    once more.
    """

    other_token: Int[Tensor, "types histories fed"]
    shuffled: Int[Tensor, "contexts fed"]
    random: Int[Tensor, "contexts fed"]
    none: Int[Tensor, "contexts short"]


def choose_contexts(
    stream: Int[Tensor, " tokens"],
    *,
    bos: int | None = None,
    length: int = CONTEXT_LENGTH,
    types: int = CONTEXT_TYPES,
    per_type: int = CONTEXTS_PER_TYPE,
) -> HistoryContexts:
    """The contexts of HU1: the first `per_type` of the `types` token types with most non-overlapping occurrences.

    `stream` is the corpus' first 2N blocks without BOS, as one. Occurrences with a full context are taken left to
    right and kept when at least `length` after the last kept of their type; equal counts prefer the lower id. Types
    with a single context are left out, since they give no pair. `bos` is put in front where the model uses one.
    Raises DataError where no type has two contexts.
    """
    kept: dict[int, list[int]] = {}
    for end, token in enumerate(stream[length - 1 :].tolist(), start=length - 1):
        ends = kept.setdefault(token, [])
        if not ends or end - ends[-1] >= length:
            ends.append(end)
    ranked = sorted((token for token in kept if len(kept[token]) > 1), key=lambda token: (-len(kept[token]), token))
    if not ranked:
        raise DataError(
            f"no token of {stream.numel()} stands in two contexts of {length} tokens",
            "give a longer corpus, or leave out the probe `uncertainty`",
        )
    chosen = torch.tensor([end for token in ranked[:types] for end in kept[token][:per_type]])
    rows = stream.cpu()[chosen[:, None] + torch.arange(1 - length, 1)]
    front = rows.new_tensor([] if bos is None else [bos]).expand(len(rows), -1)
    return HistoryContexts(tokens=torch.cat([front, rows], dim=1), types=rows[:, -1], ends=chosen, length=length)


def control_contexts(contexts: HistoryContexts, stream: Int[Tensor, " tokens"], *, seed: int = 0) -> HistoryControls:
    """The texts of every control; `random` draws from `stream` with replacement, so frequent tokens stay frequent."""
    generator = torch.Generator().manual_seed(seed)
    tokens, types = contexts.tokens, contexts.types
    first_type = tokens[types == types[0]]
    distinct = types.unique_consecutive()
    other_token = first_type.expand(len(distinct), -1, -1).clone()
    other_token[:, :, -1] = distinct[:, None]
    history = slice(SINK_TOKENS, tokens.shape[1] - 1)
    order = torch.rand(tokens[:, history].shape, generator=generator).argsort(dim=1)
    shuffled, random = tokens.clone(), tokens.clone()
    shuffled[:, history] = tokens[:, history].gather(1, order)
    drawn = torch.randint(stream.numel(), tokens[:, history].shape, generator=generator)
    random[:, history] = stream.cpu()[drawn]
    none = torch.cat([tokens[:, :SINK_TOKENS], tokens[:, -1:]], dim=1)
    return HistoryControls(other_token=other_token, shuffled=shuffled, random=random, none=none)


def hu1(
    masks: Bool[Tensor, "layers contexts neurons"],
    types: Int[Tensor, " contexts"],
    rates: Rates,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LayerIntervals:
    """HU1 = 1 - mean kappa(M(v, c), M(v, c')): pairs of contexts averaged per token type, then types, then layers.

    `masks` are those of the last token of every context. 0: the token alone decides the mask; 1: two histories make
    its masks as different as chance. With the uniform rate the definition; with popularity rates what is left beyond
    a static hot set. Contexts are resampled within their type. Our definition [I].
    """
    groups = types.cpu()
    kappas = _layer_kappas(masks, rates)
    weights = stratified_weights(groups, resamples=resamples, seed=seed)
    values = 1 - _mean_by_type(kappas, groups, torch.ones(1, len(groups), dtype=torch.float64))[0]
    return layer_intervals(values, 1 - _mean_by_type(kappas, groups, weights), len(groups))


def hu1_control(
    natural: Bool[Tensor, "layers contexts neurons"],
    control: Bool[Tensor, "layers contexts neurons"],
    types: Int[Tensor, " contexts"],
    rates: Rates,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LayerIntervals:
    """1 - mean kappa of each context's mask with that of its own control, averaged per type, then types, then layers.

    For the identical context fed again it must be 0; for a shuffled, random or missing history it says what order,
    content and length of the history change. Same scale as `hu1`. Our definition [I].
    """
    groups = types.cpu()
    kappas = paired_overlaps(natural, control).kappa(_per_layer(rates, 1)).double().cpu()
    valid = ~kappas.isnan()
    filled = kappas.nan_to_num(0.0)
    weights = stratified_weights(groups, resamples=resamples, seed=seed)

    def mean_by_type(drawn: Tensor) -> Tensor:
        per_type = []
        for token in groups.unique():
            members = (groups == token).double() * drawn
            per_type.append((members @ filled.mT) / (members @ valid.double().mT))
        return torch.stack(per_type).nanmean(dim=0)

    values = 1 - mean_by_type(torch.ones(1, len(groups), dtype=torch.float64))[0]
    return layer_intervals(values, 1 - mean_by_type(weights), len(groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryShare:
    """How much of a mask's specificity comes from the history rather than the token: share = h / (h + t).

    h = `history` - `base`, t = `token` - `base`, where `history` is the mean kappa of different tokens after the same
    history, `token` of the same token after different histories, `base` of different tokens after different
    histories. 0: all token; 1: all history; None where h + t <= 0 (neither leaves a trace). The mean's share is the
    share of the layer means.
    """

    share: LayerIntervals
    history: LayerIntervals
    token: LayerIntervals
    base: LayerIntervals


def history_share(
    natural: Bool[Tensor, "layers contexts neurons"],
    contexts: HistoryContexts,
    other_token: Bool[Tensor, "layers types histories neurons"],
    rates: Rates,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> HistoryShare:
    """The history share of every layer, on kappa_p (give popularity rates). Our definition [I].

    `natural` are the masks of `contexts`, `other_token` those of `HistoryControls.other_token`. The base takes pairs
    of natural contexts of different types; those whose windows overlap in the stream share a history and are left out.
    """
    groups = contexts.types.cpu()
    kappas = _layer_kappas(natural, rates)
    unrelated = (groups[:, None] != groups[None, :]) & ~contexts.overlapping.cpu()
    base_kappas = torch.where(unrelated, kappas, math.nan)
    same_history = _same_history_kappas(other_token, rates)

    def means(drawn: Tensor, histories: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = ~same_history.isnan()
        history = (histories @ same_history.nan_to_num(0.0).mT) / (histories @ valid.double().mT)
        return history, _mean_by_type(kappas, groups, drawn), weighted_pair_means(base_kappas, drawn)

    n_histories = same_history.shape[1]
    ones = torch.ones(1, len(groups), dtype=torch.float64)
    values = means(ones, ones[:, :1].expand(1, n_histories))
    samples = means(
        stratified_weights(groups, resamples=resamples, seed=seed),
        resample_weights(n_histories, resamples=resamples, seed=seed + 1),
    )
    history, token, base = (
        layer_intervals(value[0], sample, len(groups)) for value, sample in zip(values, samples, strict=True)
    )
    shares = layer_intervals(_share(*values)[0], _share(*samples), len(groups))
    overall = layer_intervals(
        _share(*(value.nanmean(dim=1, keepdim=True) for value in values))[0],
        _share(*(sample.nanmean(dim=1, keepdim=True) for sample in samples)),
        len(groups),
    )
    return HistoryShare(
        share=LayerIntervals(layers=shares.layers, mean=overall.mean), history=history, token=token, base=base
    )


def _share(history: Tensor, token: Tensor, base: Tensor) -> Tensor:
    above = history + token - 2 * base
    return torch.where(above > 0, (history - base) / above, math.nan)


def _same_history_kappas(other_token: Tensor, rates: Rates) -> Tensor:
    """The mean kappa over pairs of types, for every layer and history: [layers, histories]."""
    by_history = torch.stack(
        [pairwise_overlaps(rows, rows).kappa(rate) for rows, rate in _layers(other_token.transpose(1, 2), rates)]
    ).double()
    pairs = ~torch.eye(by_history.shape[-1], dtype=torch.bool, device=by_history.device)
    return by_history[..., pairs].nanmean(dim=-1).cpu()


def _layer_kappas(masks: Tensor, rates: Rates) -> Tensor:
    """Kappa of every pair of rows in every layer, [layers, rows, rows]; one layer at a time, to bound memory."""
    return (
        torch.stack([pairwise_overlaps(rows, rows).kappa(rate) for rows, rate in _layers(masks, rates)]).double().cpu()
    )


def _layers(masks: Tensor, rates: Rates) -> Iterator[tuple[Tensor, float]]:
    return zip(masks, torch.as_tensor(rates).expand(len(masks)).tolist(), strict=True)


def _per_layer(rates: Rates, trailing: int) -> Tensor:
    rates = torch.as_tensor(rates)
    return rates.reshape(*rates.shape, *[1] * trailing)


def _mean_by_type(kappas: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Means over pairs within each type, then over types: [resamples, layers]."""
    per_type = []
    for token in groups.unique():
        rows = (groups == token).nonzero().flatten()
        per_type.append(weighted_pair_means(kappas[:, rows[:, None], rows], weights[:, rows]))
    return torch.stack(per_type).nanmean(dim=0)


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


def theta_uncertainty(salience: Float[Tensor, "positions neurons"]) -> Float[Tensor, " positions"]:
    """HU4(t) = 1 - Spearman over neurons of Theta(t-1) with g(t), where Theta(t) = g(t) + Theta(t-1).

    `salience` is g_i(t) = |a_i dL/da_i| of one layer and block, L the sum of the block's NLL. 0: what mattered so far
    ranks what matters now exactly; 1: it tells nothing; up to 2: the reverse. NaN at the first position, and where
    either is constant (the last position has no loss of its own). MOYU's recursion [A]; the measure is ours [I].
    """
    current = salience.double().cpu().numpy()
    before = np.zeros_like(current)
    np.cumsum(current[:-1], axis=0, out=before[1:])
    left, right = (_standard_ranks(part) for part in (before, current))
    return torch.from_numpy(1 - (left * right).sum(axis=1))


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks within each row, centred and of unit norm, so that a product of two rows is Spearman's rho."""
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, norms, out=np.full_like(ranks, np.nan), where=norms > 0)


def token_diversity(tokens: Int[Tensor, " positions"]) -> Float[Tensor, " positions"]:
    """Distinct over total token ids in 0..t, for every t of a block, sink positions included; above 0, at most 1."""
    ids = tokens.cpu().numpy()
    new = np.zeros(len(ids))
    new[np.unique(ids, return_index=True)[1]] = 1
    return torch.from_numpy(new.cumsum() / np.arange(1, len(ids) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityBin:
    """HU4 at the `tokens` positions whose diversity lies in [low, high) (the last bin includes 1)."""

    low: float
    high: float
    uncertainty: LayerIntervals
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThetaUncertainty:
    uncertainty: LayerIntervals
    bins: tuple[DiversityBin, ...]


def hu4(
    values: Float[Tensor, "layers blocks positions"],
    diversity: Float[Tensor, "blocks positions"],
    *,
    bins: int = DIVERSITY_BINS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ThetaUncertainty:
    """The mean of HU4(t) over tokens, and in `bins` equal steps of diversity from 0 to 1; blocks are resampled.

    `values` come from `theta_uncertainty`, `diversity` from `token_diversity` at the same positions.
    """
    values = values.double().cpu()
    valid = ~values.isnan()
    filled = values.nan_to_num(0.0)
    places = (diversity.cpu() * bins).long().clamp(max=bins - 1)

    def over(members: Tensor) -> LayerIntervals:
        chosen = valid & members
        return layered_ratio((filled * chosen).sum(-1), chosen.double().sum(-1), resamples=resamples, seed=seed)

    return ThetaUncertainty(
        uncertainty=over(torch.ones_like(places, dtype=torch.bool)),
        bins=tuple(
            DiversityBin(
                low=place / bins,
                high=(place + 1) / bins,
                uncertainty=over(places == place),
                tokens=int((places == place).sum()),
            )
            for place in range(bins)
        ),
    )


def signed_gradient_sum(
    activations: Float[Tensor, "tokens neurons"],
    gradients: Float[Tensor, "tokens neurons"],
    masks: Bool[Tensor, "tokens neurons"],
) -> tuple[float, int]:
    """The sum of sign(a_i) * dL/da_i over the entries of the masks of one sequence and layer, and their number."""
    total = (activations.sign() * gradients).double()[masks].sum()
    return float(total), int(masks.sum())


def root_cause(
    sums: Float[Tensor, "layers sequences"],
    counts: Float[Tensor, "layers sequences"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LayerIntervals:
    """M2: the mean of sign(a_i) * dL/da_i over active entries, per layer, sequences resampled.

    Above 0: shrinking the active neurons would lower the loss (they are over-activated, MOYU's root cause); below 0:
    the model would gain from activating them more. Sums and counts come from `signed_gradient_sum`; L is the sum of
    a block's NLL in nats. MOYU [A]; the choice of entries is ours [I].
    """
    return layered_ratio(sums, counts, resamples=resamples, seed=seed)
