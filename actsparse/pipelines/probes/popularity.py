"""How often each neuron fires over the calibration blocks: the chance level of kappa_p (methods.md section 4)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import firing_counts, popularity_rate
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.progress import Progress


@dataclass(frozen=True)
class Popularity:
    """Firing counts [layers, neurons] in the masks of every rule."""

    counts: dict[MaskRule, Int[Tensor, "layers neurons"]]

    def rates(self, rule: MaskRule) -> Float[Tensor, " layers"]:
        """The chance rate of every layer in the masks of a rule."""
        return popularity_rate(self.counts[rule])

    def tensors(self) -> dict[str, Tensor]:
        """The counts by name, for a shard."""
        return {rule.name: counts for rule, counts in self.counts.items()}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor], rules: tuple[MaskRule, ...]) -> "Popularity":
        """The popularity whose `tensors()` these are."""
        return cls({rule: named[rule.name] for rule in rules})


def measure_popularity(
    reader: NeuronReader, blocks: Int[Tensor, "blocks seq"], sink_tokens: int, progress: Progress
) -> Popularity:
    """The popularity over all positions of `blocks` after the sink tokens."""
    shape = (len(reader.layers), reader.neurons)
    counts = {rule: torch.zeros(shape, dtype=torch.int64) for rule in reader.rules}

    def on_layer(place: int, a: Tensor) -> None:
        for rule, total in counts.items():
            total[place] += firing_counts(reader.masks(place, a[:, sink_tokens:], rule)).cpu()

    with progress.task("chance: how often neurons fire", blocks.numel(), "tokens") as advance:
        for _, ids in reader.batched(blocks):
            reader.read(ids, on_layer)
            advance(ids.numel())
    return Popularity(counts)
