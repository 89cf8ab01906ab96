"""What the methods that read the prompt statistic have in common: what of the prompt they read."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.base import Calibration, Fit, Method
from actsparse.methods.gates import LayerGates, PrefillGate, Statistic
from actsparse.methods.prompt_statistic import PromptReading, PromptStatistic, Source


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method, ABC):
    """Reads neuron activations (`source=a`), neuron outputs (`n`), gate activations (`gate`) or up projections (`up`)
    of the prompt, or of its `first` tokens. With `refresh_every` R, every R-th decoded token runs dense, joins the
    statistic, and the mask is chosen again (0: never, as in the papers)."""

    source: Source = "a"
    first: int = 0
    refresh_every: int = 0

    def __post_init__(self) -> None:
        if self.first < 0:
            raise PlanError(f"{self.name}: first must be at least 0, not {self.first}", "0 reads the whole prompt")
        if self.refresh_every < 0:
            raise PlanError(
                f"{self.name}: refresh_every must be at least 0, not {self.refresh_every}", "0 chooses once a sequence"
            )
        if self.first and self.refresh_every:
            raise PlanError(
                f"{self.name}: first={self.first} reads the prompt's beginning alone, refresh_every reads on",
                "give one of the two",
            )

    def check(self, gated: bool) -> None:
        super().check(gated)
        self.reading.check(self.name, gated)

    @property
    def needs_replay(self) -> bool:
        return self.source == "n"

    @property
    def control(self) -> str:
        return "static:stat=griffin" + (f",source={self.source}" if self.source != "a" else "")

    @property
    def reading(self) -> PromptReading:
        return PromptReading(source=self.source, first=self.first)

    def norm_tensors(self, calibration: Calibration) -> dict[str, Tensor]:
        """The column norms that the gates of source `n` need, by name."""
        if self.source != "n":
            return {}
        return {f"layers.{i}.norms": calibration.down_norms(i) for i in range(len(calibration.widths))}

    def gate(self, statistic: Callable[[], Statistic], rule: Callable[[Tensor], Tensor]) -> LayerGates:
        """The gates of a layer that chooses by a rule from a statistic of the prompt."""
        gate = PrefillGate(statistic, rule, site=self.reading.site, refresh_every=self.refresh_every)
        return LayerGates(neurons=gate)

    def statistic(self, layer: int, fit: Fit) -> Callable[[], PromptStatistic]:
        """Makes the statistic of a prompt in one layer."""
        return partial(self.reading.statistic, fit.tensors.get(f"layers.{layer}.norms"))
