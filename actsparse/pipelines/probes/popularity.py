"""How often each neuron fires over the calibration blocks: the chance level of kappa_p (methods.md section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Chance, Rate, Widths, firing_counts, popularity_rate
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.progress import Progress


@dataclass(frozen=True)
class Popularity:
    """Firing counts [layers, units] in the masks of every rule."""

    counts: dict[MaskRule, Int[Tensor, "layers units"]]

    def rates(self, rule: MaskRule, widths: Sequence[Widths]) -> list[Rate]:
        """The chance level of every layer in the masks of a rule."""
        return [popular(counts, of_layer) for counts, of_layer in zip(self.counts[rule], widths, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """The counts by name, for a shard."""
        return {rule.name: counts for rule, counts in self.counts.items()}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor], rules: tuple[MaskRule, ...]) -> "Popularity":
        """The popularity whose `tensors()` these are."""
        return cls({rule: named[rule.name] for rule in rules})


def popular(counts: Int[Tensor, " units"], widths: Widths) -> Rate:
    """The chance level of a layer whose units fire so often."""
    if len(widths) == 1:
        return float(popularity_rate(counts[: widths[0]]))
    return Chance.by_popularity(counts, widths)


def measure_popularity(
    reader: NeuronReader, blocks: Int[Tensor, "blocks seq"], sink_tokens: int, progress: Progress
) -> Popularity:
    """The popularity over all positions of `blocks` after the sink tokens."""
    shape = (len(reader.layers), reader.units)
    counts = {rule: torch.zeros(shape, dtype=torch.int64) for rule in reader.rules}

    def on_layer(place: int, a: Tensor) -> None:
        for rule, total in counts.items():
            total[place] += firing_counts(reader.masks(place, a[:, sink_tokens:], rule)).cpu()

    with progress.task("chance: how often neurons fire", blocks.numel(), "tokens") as advance:
        for _, ids in reader.batched(blocks):
            reader.read(ids, on_layer)
            advance(ids.numel())
    return Popularity(counts)
