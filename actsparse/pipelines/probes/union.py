"""The probe `union`: how many neurons a batch of B tokens needs together (methods.md section 6)."""

import torch
from jaxtyping import Int
from torch import Tensor

from actsparse.core.batch_union import BatchUnion, batch_union
from actsparse.core.mask_rules import MaskRule
from actsparse.pipelines.probes.reading import batched
from actsparse.pipelines.probes.setting import Found, Setting

MAX_BATCH = 64
LENGTH = 128
TOKENS_PER_SEQUENCE = 16
MASK_BYTES = 256 * 2**20
LAYER_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CURVES = {"union": "measured", "union_independent": "independent", "union_uniform": "uniform"}


def union(setting: Setting) -> Found:
    """The union density of batches of 1 to 64 tokens, per layer and in the mean, against two predictions."""
    found = Found(setting.layers)
    masks, sequences = _collect(setting)
    for rule, of_layers in masks.items():
        layers = [batch_union(rows, sequences, max_batch=MAX_BATCH, seed=setting.texts.seed) for rows in of_layers]
        for metric, curve in CURVES.items():
            _add_curve(found, metric, layers, [getattr(one, curve) for one in layers], rule)
    return found


def _add_curve(
    found: Found, metric: str, layers: list[BatchUnion], curves: list[tuple[float, ...]], rule: MaskRule
) -> None:
    for layer, curve in zip(found.layers, curves, strict=True):
        for size in LAYER_BATCHES:
            if size <= len(curve):
                found.add(metric, curve[size - 1], layers[0].tokens, layer=layer, **rule.where, b=size)
    for size, values in enumerate(zip(*curves, strict=True), start=1):
        found.add(metric, sum(values) / len(values), layers[0].tokens, layer=None, **rule.where, b=size)


def _collect(setting: Setting) -> tuple[dict[MaskRule, Tensor], Int[Tensor, " tokens"]]:
    """Masks [layers, tokens, neurons] of random positions of blocks spread over the text, and each one's block."""
    reader, sink = setting.reader, setting.texts.sink_tokens
    ids = setting.texts.spread(MAX_BATCH)[:, : max(sink + 1, LENGTH)]
    room = MASK_BYTES // (len(reader.rules) * len(reader.layers) * reader.neurons * len(ids))
    taken = max(1, min(TOKENS_PER_SEQUENCE, ids.shape[1] - sink, room))
    generator = torch.Generator().manual_seed(setting.texts.seed)
    positions = sink + torch.rand(len(ids), ids.shape[1] - sink, generator=generator).argsort(dim=1)[:, :taken]
    shape = (len(reader.layers), len(ids), taken, reader.neurons)
    masks = {rule: torch.zeros(shape, dtype=torch.bool) for rule in reader.rules}
    with setting.progress.task("union: neurons of a batch", ids.numel(), "tokens") as advance:
        for rows, batch in batched(ids):

            def on_layer(place: int, a: Tensor, rows: slice = rows) -> None:
                where = positions[rows].to(a.device)
                chosen = a[torch.arange(len(where), device=a.device)[:, None], where]
                for rule, kept in masks.items():
                    kept[place, rows] = reader.masks(place, chosen, rule).cpu()

            reader.read(batch, on_layer)
            advance(batch.numel())
    labels = torch.arange(len(ids)).repeat_interleave(taken)
    return {rule: kept.flatten(1, 2) for rule, kept in masks.items()}, labels
