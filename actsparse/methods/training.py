"""What a method with a trained part may ask for: a bounded sample of calibration tokens, and a place to keep finished
layers, so that an interrupted training goes on where it stopped."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from actsparse.results import SiteKind


@dataclass(frozen=True)
class LayerPairs:
    """What one layer read and did at sampled tokens, in the model's dtype: inputs at a site [tokens, hidden] and neuron
    activations [tokens, neurons] (or what another target site has); `held` tokens come from the end of the text and
    serve to judge."""

    layer: int
    x: Float[Tensor, "tokens hidden"]
    a: Float[Tensor, "tokens neurons"]
    held_x: Float[Tensor, "held hidden"]
    held_a: Float[Tensor, "held neurons"]


class Training(Protocol):
    """A sample of calibration tokens for training, layer by layer."""

    @property
    def hidden(self) -> int:
        """Channels that a layer reads."""
        ...

    @property
    def exact_zeros(self) -> bool:
        """Whether the model's activation function makes exact zeros (ReLU and its square)."""
        ...

    def pairs(
        self,
        site: SiteKind,
        layers: Sequence[int],
        *,
        ahead: int,
        tokens: int,
        seed: int,
        target: SiteKind = SiteKind.NEURON,
    ) -> Iterator[LayerPairs]:
        """The pairs of `layers` in order, at most `tokens` tokens, drawn with a seed. Layers run in groups whose
        sample stays within 512 MB, each group one pass over the text. `ahead` 1 takes the input of the layer before
        (the first layer then takes its own)."""
        ...

    def read_rows(self, layer: int) -> Float[Tensor, "neurons hidden"]:
        """What a neuron multiplies its input with: rows of the gate projection, of the first one where there is no
        gate; in float32. Raises ModelError where weights cannot be read as numbers."""
        ...

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """What an earlier attempt kept under a name; None where there is nothing."""
        ...

    def keep(self, name: str, finished: dict[str, Tensor]) -> None:
        """Keep the finished part `name` for an attempt after this one."""
        ...

    def read_file(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a safetensors file; raises RunError where it cannot be read."""
        ...

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Progress over `total` units; the context gives a function that advances it."""
        ...
