"""How often each neuron fires over the calibration blocks: the chance level of kappa_p (methods.md section 4)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.overlap import firing_counts, popularity_rate
from actsparse.pipelines.probes.reading import DENSITIES, NeuronReader, batched
from actsparse.pipelines.progress import Progress


@dataclass(frozen=True)
class Popularity:
    """Firing counts [layers, neurons] of top-k masks, by density."""

    counts: dict[float, Int[Tensor, "layers neurons"]]

    def rates(self, density: float) -> Float[Tensor, " layers"]:
        """The chance rate of every layer at a density."""
        return popularity_rate(self.counts[density])

    def tensors(self) -> dict[str, Tensor]:
        """The counts by name, for a shard."""
        return {f"r{density:g}": counts for density, counts in self.counts.items()}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor]) -> "Popularity":
        """The popularity whose `tensors()` these are."""
        return cls({density: named[f"r{density:g}"] for density in DENSITIES})


def measure_popularity(
    reader: NeuronReader, blocks: Int[Tensor, "blocks seq"], sink_tokens: int, progress: Progress
) -> Popularity:
    """The popularity over all positions of `blocks` after the sink tokens."""
    shape = (len(reader.layers), reader.neurons)
    counts = {density: torch.zeros(shape, dtype=torch.int64) for density in DENSITIES}

    def on_layer(place: int, a: Tensor) -> None:
        for density, total in counts.items():
            total[place] += firing_counts(reader.masks(place, a[:, sink_tokens:], density)).cpu()

    with progress.task("probes: popularity of neurons", blocks.numel(), "tokens") as advance:
        for _, ids in batched(blocks):
            reader.read(ids, on_layer)
            advance(ids.numel())
    return Popularity(counts)
