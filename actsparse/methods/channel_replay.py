"""What a fit may ask about the inputs of projections on calibration text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.quantiles import LogHistogram
from actsparse.methods.gates import LayerGates
from actsparse.results import StepBytes, Unit

Found = TypeVar("Found")
Place = tuple[int, Unit]
"""A projection of a layer."""


class ChannelReplay(Protocol):
    """Calibration text run through the projections of every layer, dense, after the sink tokens."""

    @property
    def layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def widths(self) -> Mapping[Unit, int]:
        """Input channels of every projection of a layer, in order."""
        ...

    @property
    def sizes(self) -> Mapping[Unit, int]:
        """Parameters of every projection of a layer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        ...

    def matrix(self, layer: int, unit: Unit) -> Float[Tensor, "out in"]:
        """The weight of a projection, in float32."""
        ...

    def scores(self, weights: Mapping[Place, Tensor]) -> Mapping[Place, LogHistogram]:
        """Histograms of |x_j| * weights_j at the input of every projection (weights of 1 where none are given)."""
        ...

    def mean_magnitudes(self) -> Mapping[Place, Tensor]:
        """Mean |x_j| over tokens at the input of every projection [in], in float64."""
        ...

    def quantiles(
        self, scores: Mapping[Place, LogHistogram], weights: Mapping[Place, Tensor], shares: Mapping[Place, float]
    ) -> Mapping[Place, tuple[float, float]]:
        """The exact empirical quantiles of scores that were counted, each with the share of values under it."""
        ...

    def covariance(self, unit: Unit) -> Sequence[Float[Tensor, "in in"]]:
        """E[x x^T] at the input of a projection, one a layer, in float64."""
        ...

    @property
    def step(self) -> StepBytes:
        """What a decode step of the model reads."""
        ...

    def kl(self, gates: Sequence[LayerGates]) -> float:
        """Mean KL of the whole model's predictions against dense under gates, over decode positions, in nats."""
        ...

    def kept(self, key: str, make: Callable[[], Found]) -> Found:
        """What was made under a key before, or is made now: measurements that several plans share."""
        ...

    def block_error(self, layer: int, gates: LayerGates) -> float:
        """Mean relative error of a whole layer's output under gates, over decode positions, on dense inputs."""
        ...

    def each_layer(self, what: str) -> Iterator[int]:
        """The layers in order, with progress shown while a fit works through them."""
        ...
