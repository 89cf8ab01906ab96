"""HU1: the same token after different histories, beside its controls (methods.md section 5)."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsparse.core.bootstrap import Interval, LayerIntervals
from actsparse.core.hu1 import HistoryContexts, control_contexts, history_share, hu1, hu1_control
from actsparse.core.mask_rules import MaskRule
from actsparse.pipelines.probes.setting import UNIFORM, Found, Setting
from actsparse.pipelines.progress import Advance

# Masks of the last token of every context, by rule.
LastMasks = dict[MaskRule, Bool[Tensor, "layers contexts units"]]
# What each control is compared with, context by context: `once` and `identical` are the same contexts, fed twice.
PAIRED_CONTROLS = {"identical": "once", "shuffled": "natural", "random": "natural", "none": "natural"}


def add_hu1(setting: Setting, found: Found) -> None:
    """Rows of `hu1`, its controls, the kappas of the history share and the share itself."""
    contexts = setting.texts.contexts
    masks, other_token = _collect(setting, contexts)
    for rule in setting.rules:
        natural = masks["natural"][rule]
        for pop, rates in setting.rates(rule).items():
            where = {**rule.where, "pop": pop}
            found.add_layers("hu1", hu1(natural, contexts.types, rates), **where)
            for name, other in PAIRED_CONTROLS.items():
                rows = _first_of_each(contexts.types) if name == "identical" else slice(None)
                control = hu1_control(masks[other][rule], masks[name][rule], contexts.types[rows], rates)
                found.add_layers("hu1", control, **where, control=name)
            share = history_share(natural, contexts, other_token[rule], rates)
            found.add_layers("hu1", _one_minus(share.history), **where, control="other-token")
            kappa = "kappa_u" if pop is UNIFORM else "kappa_p"
            found.add_layers(kappa, share.history, **where, pairs="same-history")
            found.add_layers(kappa, share.token, **where, pairs="same-token")
            found.add_layers(kappa, share.base, **where, pairs="unrelated")
            if pop is not UNIFORM:
                found.add_layers("history_share", share.share, **where)


def _collect(setting: Setting, contexts: HistoryContexts) -> tuple[dict[str, LastMasks], LastMasks]:
    """Masks of the contexts and of every control; of other tokens as [layers, types, histories, neurons]."""
    controls = control_contexts(contexts, setting.texts.stream, seed=setting.texts.seed)
    types, histories, fed = controls.other_token.shape
    # one context of each type is fed twice, not copied, both times in the same batch: in another one (that of all
    # contexts) the model itself may round otherwise in 16 bits
    first = contexts.tokens[_first_of_each(contexts.types)]
    texts = {
        "natural": contexts.tokens,
        "once": first,
        "identical": first,
        "shuffled": controls.shuffled,
        "random": controls.random,
        "none": controls.none,
    }
    after = controls.other_token.reshape(types * histories, fed)
    total = after.numel() + sum(ids.numel() for ids in texts.values())
    with setting.progress.task("uncertainty: same tokens, other histories (HU1)", total, "tokens") as advance:
        masks = {name: _last_masks(setting, ids, advance) for name, ids in texts.items()}
        other = _last_masks(setting, after, advance)
    return masks, {rule: rows.unflatten(1, (types, histories)) for rule, rows in other.items()}


def _first_of_each(types: Int[Tensor, " contexts"]) -> Int[Tensor, " types"]:
    """The rows of the first context of every type; rows are grouped by type."""
    starts = torch.ones(len(types), dtype=torch.bool)
    starts[1:] = types[1:] != types[:-1]
    return starts.nonzero().flatten()


def _last_masks(setting: Setting, ids: Int[Tensor, "contexts fed"], advance: Advance) -> LastMasks:
    reader = setting.reader
    shape = (len(reader.layers), len(ids), reader.units)
    masks = {rule: torch.zeros(shape, dtype=torch.bool) for rule in reader.rules}
    for rows, batch in reader.batched(ids):

        def on_layer(place: int, a: Tensor, rows: slice = rows) -> None:
            for rule, kept in masks.items():
                kept[place, rows] = reader.masks(place, a[:, -1], rule).cpu()

        reader.read(batch, on_layer)
        advance(batch.numel())
    return masks


def _one_minus(kappas: LayerIntervals) -> LayerIntervals:
    """The same on the scale of HU1."""
    return LayerIntervals(layers=tuple(_flipped(one) for one in kappas.layers), mean=_flipped(kappas.mean))


def _flipped(kappa: Interval) -> Interval:
    value, low, high = (None if end is None else 1 - end for end in (kappa.value, kappa.high, kappa.low))
    return Interval(value=value, low=low, high=high, n=kappa.n, stderr=kappa.stderr)
