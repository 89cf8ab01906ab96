"""How often each neuron fires over the calibration blocks: the chance level of kappa_p (methods.md section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Chance, Rate, Widths, firing_counts, popularity_rate, squared_sizes
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.progress import Progress

SQUARES = ".squares"


@dataclass(frozen=True)
class Popularity:
    """Firing counts [layers, units] in the masks of every rule, and the summed squares of their sizes [layers, groups].

    Layers of fewer groups end in zeros.
    """

    counts: dict[MaskRule, Int[Tensor, "layers units"]]
    squares: dict[MaskRule, Int[Tensor, "layers groups"]]

    def rates(self, rule: MaskRule, widths: Sequence[Widths]) -> list[Rate]:
        """The chance level of every layer in the masks of a rule."""
        layers = zip(self.counts[rule], self.squares[rule], widths, strict=True)
        return [_rate(counts, squares, of_layer) for counts, squares, of_layer in layers]

    def tensors(self) -> dict[str, Tensor]:
        """The counts and squares by name, for a shard."""
        squares = {rule.name + SQUARES: squares for rule, squares in self.squares.items()}
        return {rule.name: counts for rule, counts in self.counts.items()} | squares

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor], rules: tuple[MaskRule, ...]) -> "Popularity":
        """The popularity whose `tensors()` these are."""
        return cls({rule: named[rule.name] for rule in rules}, {rule: named[rule.name + SQUARES] for rule in rules})


def popular(masks: Bool[Tensor, "*batch units"], widths: Widths) -> Rate:
    """The chance level by popularity of a layer that has these masks."""
    return _rate(firing_counts(masks), squared_sizes(masks, widths), widths)


def _rate(counts: Int[Tensor, " units"], squares: Int[Tensor, " groups"], widths: Widths) -> Rate:
    if len(widths) == 1:
        return float(popularity_rate(counts[: widths[0]], squares[0]))
    return Chance.by_popularity(counts, squares, widths)


def measure_popularity(
    reader: NeuronReader, blocks: Int[Tensor, "blocks seq"], sink_tokens: int, progress: Progress
) -> Popularity:
    """The popularity over all positions of `blocks` after the sink tokens."""
    layers, groups = len(reader.layers), max(map(len, reader.widths))
    counts = {rule: torch.zeros(layers, reader.units, dtype=torch.int64) for rule in reader.rules}
    squares = {rule: torch.zeros(layers, groups, dtype=torch.int64) for rule in reader.rules}

    def on_layer(place: int, a: Tensor) -> None:
        widths = reader.widths[place]
        for rule in reader.rules:
            masks = reader.masks(place, a[:, sink_tokens:], rule)
            counts[rule][place] += firing_counts(masks).cpu()
            squares[rule][place, : len(widths)] += squared_sizes(masks, widths).cpu()

    with progress.task("chance: how often neurons fire", blocks.numel(), "tokens") as advance:
        for _, ids in reader.batched(blocks):
            reader.read(ids, on_layer)
            advance(ids.numel())
    return Popularity(counts, squares)
