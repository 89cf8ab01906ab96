"""HU2: how much of a neuron's firing the token id leaves open (methods.md section 5).

The text is read twice: once to count, and once to say what each sequence adds to the entropies, for the intervals.
Counts of every sequence would not fit in memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from actsparse.core.hu2 import CodeLengths, TypeCounts, TypeLabels, code_length, count_types, hu2
from actsparse.core.mask_rules import MaskRule
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.text import MAX_TYPES

# What counts of token types may take, of 4 bytes each, and how many types are counted nevertheless.
COUNT_BYTES, COUNT_ITEM, FEWEST_TYPES = 2**30, 4, 8

# (rule, place of the layer, sequence, counts by token type, counts by shuffled type)
OnSequence = Callable[[MaskRule, int, int, TypeCounts, TypeCounts], None]

# Counts of a rule and layer by token type, and by shuffled type.
Counts = dict[tuple[MaskRule, int], tuple[TypeCounts, TypeCounts]]


def add_hu2(setting: Setting, found: Found) -> None:
    """Rows of `hu2` and of what it is made of, per layer and in the mean."""
    labels = setting.texts.labels(_affordable_types(setting.reader))
    tokens = int((labels.labels >= 0).sum())
    for rule, lengths in _code_lengths(setting, labels, _count(setting, labels)).items():
        ratio = hu2(lengths)
        found.add_layers("hu2", ratio.value, **rule.where)
        found.add_layers("hu2_uncorrected", ratio.uncorrected, **rule.where)
        found.add_layers("hu2_shuffled", ratio.shuffled, **rule.where)
        units = torch.tensor([sum(widths) for widths in setting.reader.widths])
        # without a frequent type there is no entropy: 0 / 0
        entropies = (lengths.untyped.sum(dim=1) / tokens / units).tolist()
        for layer, entropy in zip((*found.layers, None), (*entropies, sum(entropies) / len(entropies)), strict=True):
            found.add("hu2_entropy", entropy, tokens, layer=layer, **rule.where)


def _affordable_types(reader: NeuronReader) -> int:
    """How many types there is room to count, twice each: all but in very wide layers of experts."""
    each = 2 * COUNT_ITEM * len(reader.layers) * reader.units * len(reader.rules)
    return max(FEWEST_TYPES, min(MAX_TYPES, COUNT_BYTES // each))


def _count(setting: Setting, labels: TypeLabels) -> Counts:
    counts: Counts = {}

    def on_sequence(rule: MaskRule, place: int, row: int, typed: TypeCounts, shuffled: TypeCounts) -> None:
        if (rule, place) in counts:
            before = counts[rule, place]
            typed, shuffled = before[0].merge(typed), before[1].merge(shuffled)
        counts[rule, place] = (typed, shuffled)

    _read(setting, labels, "uncertainty: what token ids tell (HU2)", on_sequence)
    return counts


def _code_lengths(setting: Setting, labels: TypeLabels, counts: Counts) -> dict[MaskRule, CodeLengths]:
    shape = (3, len(setting.layers), len(setting.texts.history_blocks))
    nats = {rule: torch.zeros(shape, dtype=torch.float64) for rule in setting.rules}

    def on_sequence(rule: MaskRule, place: int, row: int, typed: TypeCounts, shuffled: TypeCounts) -> None:
        all_typed, all_shuffled = counts[rule, place]
        parts = ((typed, all_typed), (shuffled, all_shuffled), (typed.untyped, all_typed.untyped))
        nats[rule][:, place, row] = torch.tensor([code_length(part, whole) for part, whole in parts])

    _read(setting, labels, "uncertainty: what each text adds to that (HU2)", on_sequence)
    return {rule: CodeLengths(typed=of[0], shuffled=of[1], untyped=of[2]) for rule, of in nats.items()}


def _read(setting: Setting, labels: TypeLabels, what: str, on_sequence: OnSequence) -> None:
    texts, reader = setting.texts, setting.reader
    blocks, types = texts.history_blocks, len(labels.types)
    shape = (len(blocks), blocks.shape[1] - texts.sink_tokens)
    typed, shuffled = labels.labels.view(shape), labels.shuffled.view(shape)
    with setting.progress.task(what, blocks.numel(), "tokens") as advance:
        for rows, batch in reader.batched(blocks):

            def on_layer(place: int, a: Tensor, first: int = rows.start) -> None:
                for rule in reader.rules:
                    masks = reader.masks(place, a[:, texts.sink_tokens :], rule)
                    for row, of_row in enumerate(masks, start=first):
                        counts = (count_types(of_row, of_labels[row], types) for of_labels in (typed, shuffled))
                        on_sequence(rule, place, row, *counts)

            reader.read(batch, on_layer)
            advance(batch.numel())
