"""What the methods that read the prompt statistic have in common: what of the prompt they read."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit, Method
from actsparse.methods.prompt_statistic import PromptReading, PromptStatistic, Source


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method, ABC):
    """Reads neuron activations (`source=a`) or neuron outputs (`source=n`) of the prompt, or of its `first` tokens."""

    source: Source = "a"
    first: int = 0

    def __post_init__(self) -> None:
        if self.first < 0:
            raise PlanError(f"{self.name}: first must be at least 0, not {self.first}", "0 reads the whole prompt")

    @property
    def needs_replay(self) -> bool:
        return self.source == "n"

    @property
    def reading(self) -> PromptReading:
        return PromptReading(source=self.source, first=self.first)

    def norm_tensors(self, calibration: Calibration) -> dict[str, Tensor]:
        """The column norms that the gates of source `n` need, by name."""
        if self.source == "a":
            return {}
        return {f"layers.{i}.norms": calibration.down_norms(i) for i in range(len(calibration.widths))}

    def statistic(self, layer: int, fit: Fit) -> Callable[[], PromptStatistic]:
        """Makes the statistic of a prompt in one layer."""
        return partial(self.reading.statistic, fit.tensors.get(f"layers.{layer}.norms"))
