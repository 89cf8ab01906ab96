"""The probe `union`: how many neurons a batch of B tokens needs together (methods.md section 6)."""

import torch
from jaxtyping import Int
from torch import Tensor

from actsparse.core.batch_union import batch_union, layer_unions, union_blocks
from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import firing_counts
from actsparse.pipelines.probes.setting import Found, Setting

MAX_BATCH = 64
# A count of its positions fits in a byte.
LENGTH = 128
COUNT_BYTES = 512 * 2**20
LAYER_BATCHES = (1, 2, 4, 8, 16, 32, 64)

# At how many tokens of each sequence a neuron fires, by rule.
Fired = dict[MaskRule, Int[Tensor, "layers sequences units"]]


def union(setting: Setting) -> Found:
    """The union density of batches of 1 to 64 tokens, per layer and in the mean, against two predictions."""
    found = Found(setting.layers)
    counts, tokens = _collect(setting)
    device = setting.reader.loaded.device
    for rule, fired in counts.items():
        layers = [
            batch_union(of_layer[:, : sum(widths)].to(device), tokens, max_batch=MAX_BATCH)
            for of_layer, widths in zip(fired, setting.reader.widths, strict=True)
        ]
        for size, measured in enumerate(layer_unions(layers), start=1):
            if size in LAYER_BATCHES:
                found.add_layers("union", measured, **rule.where, b=size)
            else:
                found.add_interval("union", measured.mean, layer=None, **rule.where, b=size)
        for metric, curves in {
            "union_independent": [one.independent for one in layers],
            "union_uniform": [one.uniform for one in layers],
        }.items():
            _add_curve(found, metric, curves, layers[0].tokens, rule)
    return found


def _add_curve(found: Found, metric: str, curves: list[tuple[float, ...]], tokens: int, rule: MaskRule) -> None:
    for size, values in enumerate(zip(*curves, strict=True), start=1):
        if size in LAYER_BATCHES:
            for layer, value in zip(found.layers, values, strict=True):
                found.add(metric, value, tokens, layer=layer, **rule.where, b=size)
        found.add(metric, sum(values) / len(values), tokens, layer=None, **rule.where, b=size)


def _collect(setting: Setting) -> tuple[Fired, int]:
    """How often neurons fire in the first tokens of blocks spread over the text, of how many tokens of each block."""
    reader, sink = setting.reader, setting.texts.sink_tokens
    room = COUNT_BYTES // (len(reader.rules) * len(reader.layers) * reader.units)
    pool = setting.texts.pool
    ids = pool[union_blocks(len(pool), max(2, min(MAX_BATCH, room))), : max(sink + 1, LENGTH)]
    shape = (len(reader.layers), len(ids), reader.units)
    counts = {rule: torch.zeros(shape, dtype=torch.uint8) for rule in reader.rules}
    with setting.progress.task("union: neurons of a batch", ids.numel(), "tokens") as advance:
        for rows, batch in reader.batched(ids):

            def on_layer(place: int, a: Tensor, rows: slice = rows) -> None:
                for rule, fired in counts.items():
                    masks = reader.masks(place, a[:, sink:], rule)
                    fired[place, rows] = torch.stack([firing_counts(row) for row in masks]).to(torch.uint8).cpu()

            reader.read(batch, on_layer)
            advance(batch.numel())
    return counts, ids.shape[1] - sink
