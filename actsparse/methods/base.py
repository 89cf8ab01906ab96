"""The one protocol of every method: fit a plan, then open a gate for each layer.

A gate says what to keep; it never touches activations. One place (`engine.masked`) applies and counts masks, another
(`engine.slicing`) leaves out the weights of dropped neurons, so both mean the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import ClassVar, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.errors import PlanError
from actsparse.results import LayerPlan, SiteKind

ALL_MATRICES = frozenset({"gate", "up", "down"})


class Decides(StrEnum):
    """When a mask is known."""

    OFFLINE = "offline"
    PREFILL = "end of prefill"
    TOKEN = "per token"


class Statistic(Protocol):
    """A running statistic of the prompt's activations of one sequence in one layer."""

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        ...

    def value(self) -> Float[Tensor, " neurons"]:
        """The statistic over everything added so far."""
        ...


@dataclass(frozen=True)
class FixedGate:
    """Keeps the same neurons for every token: mask [neurons]."""

    mask: Bool[Tensor, " neurons"]


@dataclass(frozen=True)
class PrefillGate:
    """Chooses one mask at the end of the prompt: a statistic of the prompt, and a rule from it to a mask [neurons]."""

    statistic: Callable[[], Statistic]
    rule: Callable[[Float[Tensor, " neurons"]], Bool[Tensor, " neurons"]]


@dataclass(frozen=True)
class TokenGate:
    """Chooses for every token from the activations at `site`: keep [..., width] -> mask [..., neurons]."""

    site: SiteKind
    keep: Callable[[Float[Tensor, "*tokens width"]], Bool[Tensor, "*tokens neurons"]]


Gate = FixedGate | PrefillGate | TokenGate


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to drop: a share of the method's own units, or an error target. At most one is given."""

    drop: float | None = None
    target_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronMeans:
    """What profiles keep of a layer's neurons, each [neurons]: mean |a|*||w||, GRIFFIN's statistic, mean u^2."""

    mean_norm: Tensor
    griffin: Tensor
    mean_square_up: Tensor


class Calibration(Protocol):
    """What a fit may ask about the calibration text; asking for more costs more."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer."""
        ...

    def means(self, layer: int) -> NeuronMeans:
        """Means over all calibration tokens."""
        ...

    def quantile(self, layer: int, kind: SiteKind, share: float) -> float:
        """The quantile of |x| at a site, pooled over tokens and units."""
        ...

    def share_below(self, layer: int, kind: SiteKind, threshold: float) -> float:
        """The share of |x| at a site under a threshold."""
        ...

    def prompts(self) -> "PromptReplay":
        """The calibration blocks again, as prompts and their continuations."""
        ...


class PromptReplay(Protocol):
    """Calibration blocks replayed dense: what the prompt says, and what the continuation does."""

    def statistics(self, layer: int) -> Float[Tensor, "blocks neurons"]:
        """The prompt statistic of every block."""
        ...

    def mask_error(self, layer: int, masks: Bool[Tensor, "blocks neurons"]) -> float:
        """Mean over continuation tokens of ||FFN(x) - FFN_mask(x)|| / ||FFN(x)||, dense inputs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit found: one entry a layer, tensors by name, the share that it predicts to drop in each layer, and the
    share that it did drop on the calibration text (empty where that was not counted)."""

    layers: tuple[LayerPlan, ...]
    predicted_drop: tuple[float, ...]
    realised_drop: tuple[float, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method is its parameters. Subclasses are frozen dataclasses whose fields are the options that users may set."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    decides: ClassVar[Decides]
    needs: ClassVar[tuple[SiteKind, ...]] = (SiteKind.NEURON,)
    saves: ClassVar[frozenset[str]] = ALL_MATRICES
    gated_only: ClassVar[bool] = False
    has_engine: ClassVar[bool] = True
    takes_error_target: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = False
    needs_replay: ClassVar[bool] = False

    @abstractmethod
    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        """Derive what the gates need from calibration text; raises PlanError where the budget cannot be met."""

    @abstractmethod
    def gate(self, layer: int, fit: Fit) -> Gate:
        """The gate of one layer."""

    def replicas(self) -> tuple["Method", ...]:
        """The runs whose mean is this method's result (a random control is the mean over several seeds)."""
        return (self,)

    def check(self, gated: bool) -> None:
        """Raise PlanError where this method cannot serve a model whose FFN is (not) gated."""
        if self.gated_only and not gated:
            raise PlanError(
                f"{self.name} needs a gated FFN, and this model's has two matrices only",
                "use griffin, tda, static or cats, which serve both",
            )

    @property
    def options(self) -> dict[str, bool | int | float | str]:
        """The parameters that differ from their defaults, by name."""
        return {
            part.name: getattr(self, part.name) for part in fields(self) if getattr(self, part.name) != part.default
        }


def drop_of(budget: Budget, method: str) -> float:
    """The share to drop; raises PlanError where the budget names none, or one out of range."""
    if budget.drop is None:
        raise PlanError(f"{method} needs a share to drop", f"write {method}@0.5, or give --sparsity 0.5")
    return budget.drop


def counted_fit(layers: list[LayerPlan], tensors: dict[str, Tensor] | None = None) -> Fit:
    """The fit of a method that keeps a known number of neurons in each layer."""
    drops = tuple(1 - (one.kept or 0) / one.width for one in layers)
    return Fit(layers=tuple(layers), predicted_drop=drops, realised_drop=drops, tensors=tensors or {})
