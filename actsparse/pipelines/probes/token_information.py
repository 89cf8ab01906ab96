"""HU2: how much of a neuron's firing the token id leaves open (methods.md section 5)."""

import math

from torch import Tensor

from actsparse.core.hu2 import TypeCounts, count_types, hu2
from actsparse.core.mask_rules import MaskRule
from actsparse.pipelines.probes.reading import batched
from actsparse.pipelines.probes.setting import Found, Setting


def add_hu2(setting: Setting, found: Found) -> None:
    """Rows of `hu2` and of what it is made of, per layer and in the mean."""
    counts = _count(setting)
    for rule in setting.rules:
        results = [hu2(*(counts[rule, place, shuffled] for shuffled in (False, True))) for place in _places(setting)]
        for metric, values in {
            "hu2": [one.value for one in results],
            "hu2_uncorrected": [one.uncorrected for one in results],
            "hu2_shuffled": [one.shuffled for one in results],
            "hu2_entropy": [one.entropy for one in results],
        }.items():
            known = [value for value in values if value is not None and not math.isnan(value)]
            mean = sum(known) / len(known) if known else None
            for layer, value in zip((*setting.layers, None), (*values, mean), strict=True):
                found.add(metric, value, results[0].tokens, layer=layer, **rule.where)


def _places(setting: Setting) -> range:
    return range(len(setting.layers))


def _count(setting: Setting) -> dict[tuple[MaskRule, int, bool], TypeCounts]:
    """Counts by rule, place of the layer, and whether the labels are shuffled."""
    texts, reader, labels = setting.texts, setting.reader, setting.texts.labels
    blocks, types = texts.history_blocks, len(labels.types)
    shape = (len(blocks), blocks.shape[1] - texts.sink_tokens)
    by_block = {False: labels.labels.view(shape), True: labels.shuffled.view(shape)}
    counts: dict[tuple[MaskRule, int, bool], TypeCounts] = {}
    with setting.progress.task("uncertainty: what token ids tell (HU2)", blocks.numel(), "tokens") as advance:
        for rows, batch in batched(blocks):

            def on_layer(place: int, a: Tensor, rows: slice = rows) -> None:
                for rule in reader.rules:
                    masks = reader.masks(place, a[:, texts.sink_tokens :], rule).flatten(0, 1)
                    for shuffled, of_blocks in by_block.items():
                        key = (rule, place, shuffled)
                        seen = count_types(masks, of_blocks[rows].flatten(), types)
                        counts[key] = counts[key].merge(seen) if key in counts else seen

            reader.read(batch, on_layer)
            advance(batch.numel())
    return counts
