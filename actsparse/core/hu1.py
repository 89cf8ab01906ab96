"""HU1: the same token after different histories, how different are its masks? (methods.md, section 5)

Our own definition [I] of what MOYU (arXiv 2406.12569) calls history-related activation uncertainty.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsparse.core.bootstrap import (
    RESAMPLES,
    LayerIntervals,
    layer_intervals,
    resample_weights,
    stratified_weights,
    weighted_pair_means,
)
from actsparse.core.overlap import Rate, Rates, of_layers, paired_overlaps, pairwise_overlaps, widths_of
from actsparse.errors import DataError

CONTEXT_LENGTH = 64
CONTEXT_TYPES = 8
CONTEXTS_PER_TYPE = 8
SINK_TOKENS = 4


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
    layers = zip(natural, control, of_layers(rates, len(natural)), strict=True)
    kappas = torch.stack([paired_overlaps(one, other, widths_of(rate)).kappa(rate) for one, other, rate in layers])
    kappas = kappas.double().cpu()
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
        [_kappas(rows, rate) for rows, rate in _layers(other_token.transpose(1, 2), rates)]
    ).double()
    pairs = ~torch.eye(by_history.shape[-1], dtype=torch.bool, device=by_history.device)
    return by_history[..., pairs].nanmean(dim=-1).cpu()


def _layer_kappas(masks: Tensor, rates: Rates) -> Tensor:
    """Kappa of every pair of rows in every layer, [layers, rows, rows]; one layer at a time, to bound memory."""
    return torch.stack([_kappas(rows, rate) for rows, rate in _layers(masks, rates)]).double().cpu()


def _layers(masks: Tensor, rates: Rates) -> Iterator[tuple[Tensor, Rate]]:
    return zip(masks, of_layers(rates, len(masks)), strict=True)


def _kappas(rows: Tensor, rate: Rate) -> Tensor:
    return pairwise_overlaps(rows, rows, widths_of(rate)).kappa(rate)


def _mean_by_type(kappas: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Means over pairs within each type, then over types: [resamples, layers]."""
    per_type = []
    for token in groups.unique():
        rows = (groups == token).nonzero().flatten()
        per_type.append(weighted_pair_means(kappas[:, rows[:, None], rows], weights[:, rows]))
    return torch.stack(per_type).nanmean(dim=0)
