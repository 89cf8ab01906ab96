"""The one protocol of every method: fit a plan, then open the gates of each layer (`methods.gates`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.cett import CettPoint
from actsparse.core.masks import kept_count
from actsparse.core.quantiles import LogHistogram, share_below
from actsparse.errors import PlanError
from actsparse.methods.channel_replay import ChannelReplay
from actsparse.methods.gates import ALL_MATRICES, LayerGates, Statistic
from actsparse.methods.prompt_statistic import PromptReading
from actsparse.methods.training import Training
from actsparse.models.shape import HeadShape
from actsparse.results import FfnPlace, LayerPlan, SiteKind, Unit


class Decides(StrEnum):
    """When a mask is known."""

    OFFLINE = "offline"
    PREFILL = "end of prefill"
    TOKEN = "per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to drop: a share of the method's own units, or an error target. At most one is given.

    `drops`: a share for every layer, in place of the one for all.
    """

    drop: float | None = None
    drops: tuple[float, ...] | None = None
    target_error: float | None = None

    @property
    def names_share(self) -> bool:
        """Whether it says how much to drop, and not what error to allow."""
        return self.drop is not None or self.drops is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronMeans:
    """What profiles keep of a layer's neurons, each [neurons]: mean a, mean |a|*||w||, GRIFFIN's statistic, mean
    u^2."""

    mean: Tensor
    mean_norm: Tensor
    griffin: Tensor
    mean_square_up: Tensor


class Calibration(Protocol):
    """What a fit may ask about the calibration text; asking for more costs more."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer."""
        ...

    @property
    def ffns(self) -> tuple[FfnPlace, ...]:
        """What `widths` are of, one entry each: the MLPs of layers, or of their experts."""
        ...

    @property
    def attention(self) -> HeadShape:
        """Heads and KV groups of a layer."""
        ...

    def output_matrix(self, layer: int) -> Float[Tensor, "hidden heads_width"]:
        """The output projection of a layer's attention as numbers."""
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

    def down_norms(self, layer: int) -> Float[Tensor, " neurons"]:
        """||w_i|| of every column of the down projection, in float32."""
        ...

    def magnitudes(self, kind: SiteKind, weights: Sequence[Float[Tensor, " neurons"]]) -> Sequence[LogHistogram]:
        """Histograms of |x_i| * weights_i at a site, one a layer, from one more pass over the calibration text."""
        ...

    def pooled(self, kind: SiteKind, statistics: Sequence[Statistic]) -> Sequence[Tensor]:
        """The values of statistics, one an FFN, over every calibration token after the sink tokens at a site."""
        ...

    def pooled_attention(self, statistics: Sequence[Statistic]) -> Sequence[Tensor]:
        """The same of statistics that read the concatenated heads, one a layer."""
        ...

    def channels(self) -> ChannelReplay:
        """The calibration blocks again, as inputs of projections."""
        ...

    def prompts(self) -> "PromptReplay":
        """The calibration blocks again, as prompts and their continuations."""
        ...

    def local_errors(self, gates: Sequence[LayerGates]) -> Sequence[float]:
        """What gates over neurons do in each layer: the mean over continuation tokens of the relative error of the MLP
        output, on dense inputs. One pass over the calibration text."""
        ...

    def training(self) -> Training:
        """A sample of calibration tokens that routers may be trained on."""
        ...


class PromptReplay(Protocol):
    """Calibration blocks replayed dense: what the prompt says, and what the continuation does."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt after the sink tokens."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of a block after the sink tokens."""
        ...

    def statistics(
        self, layer: int, reading: PromptReading = ..., tokens: int | None = None
    ) -> Float[Tensor, "blocks neurons"]:
        """The prompt statistic of every block, over its first `tokens` tokens after the sink tokens (None: its
        prompt)."""
        ...

    def mask_error(self, layer: int, masks: Bool[Tensor, "blocks neurons"]) -> float:
        """Mean over continuation tokens of ||FFN(x) - FFN_mask(x)|| / ||FFN(x)||, dense inputs."""
        ...

    def each_layer(self, what: str) -> Iterator[int]:
        """The layers in order, with progress shown while a fit works through them."""
        ...

    def cett(self, layer: int, target: float) -> CettPoint:
        """The largest threshold on |a|*||w|| whose mean CETT over calibration tokens is at most `target`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit found: one entry a layer and unit, tensors by name, the share that it predicts to drop in each entry,
    and the share that it did drop on the calibration text (empty where that was not counted)."""

    layers: tuple[LayerPlan, ...]
    predicted_drop: tuple[float, ...]
    realised_drop: tuple[float, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return 1 + max(one.layer for one in self.layers)

    def of(self, layer: int, unit: Unit = Unit.NEURON) -> LayerPlan:
        """The entry of a unit in a layer."""
        return next(one for one in self.layers if (one.layer, one.unit) == (layer, unit))


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method is its parameters. Subclasses are frozen dataclasses whose fields are the options that users may set.

    `ideal`: its masks need what they save, so its bytes are those of a mask known beforehand, and it makes no speed
    claim. `caution`: what a user should know of its speed before he chooses it. `serves_experts`: its definition
    carries over to an expert, which sees the tokens routed to it alone. `is_control`: what other methods are compared
    with; it gets no controls of its own.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    caution: ClassVar[str] = ""
    decides: ClassVar[Decides]
    needs: ClassVar[tuple[SiteKind, ...]] = (SiteKind.NEURON,)
    saves: ClassVar[frozenset[str]] = ALL_MATRICES
    gated_only: ClassVar[bool] = False
    has_engine: ClassVar[bool] = True
    ideal: ClassVar[bool] = False
    is_control: ClassVar[bool] = False
    takes_error_target: ClassVar[bool] = False
    """Whether it finds what meets an error target by itself, and has a default one."""
    needs_statistics: ClassVar[bool] = False
    serves_experts: ClassVar[bool] = False

    @property
    def needs_replay(self) -> bool:
        """Whether a fit asks for the model and the text again, and not for a profile's tables alone."""
        return False

    @abstractmethod
    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        """Derive what the gates need from calibration text; raises PlanError where the budget cannot be met."""

    @abstractmethod
    def gates(self, layer: int, fit: Fit) -> LayerGates:
        """The gates of one layer."""

    def check_fit(self, fit: Fit, hidden: int) -> None:  # noqa: B027
        """Raise PlanError where what a fit found does not suit layers that read `hidden` channels."""

    @property
    def control(self) -> str | None:
        """The short form, without its share, of one mask for all text by the statistic that this method takes of a
        prompt or token; None where the usual controls have it, or where it takes none."""
        return None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the options name; what they hold is part of a plan's identity."""
        return ()

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

    def check_experts(self, places: Sequence[FfnPlace]) -> None:
        """Raise PlanError where a model has experts that this method cannot serve."""
        if not self.serves_experts and any(place.expert is not None for place in places):
            raise PlanError(
                f"{self.name} does not serve mixtures of experts: it is fitted on tokens that every layer sees,"
                " and an expert sees those routed to it alone",
                "use griffin, static, cats, chess, countdown or an oracle, which are taken per expert",
            )

    @property
    def options(self) -> dict[str, bool | int | float | str]:
        """The parameters that differ from their defaults, by name."""
        return {
            part.name: getattr(self, part.name) for part in fields(self) if getattr(self, part.name) != part.default
        }


def drops_by_layer(budget: Budget, method: str, layers: int) -> tuple[float, ...]:
    """The share to drop in each layer; raises PlanError where the budget names none."""
    if budget.drops is not None:
        return budget.drops
    if budget.drop is None:
        raise PlanError(f"{method} needs a share to drop", f"write {method}@0.5, or give --sparsity 0.5")
    return (budget.drop,) * layers


def counted_layers(budget: Budget, method: str, widths: Sequence[int]) -> list[LayerPlan]:
    """One entry a layer that keeps k = max(1, floor(r*f + 0.5)) of its f neurons."""
    drops = drops_by_layer(budget, method, len(widths))
    return [
        LayerPlan(layer=i, width=width, kept=kept_count(1 - drop, width))
        for i, (width, drop) in enumerate(zip(widths, drops, strict=True))
    ]


def counted_fit(layers: list[LayerPlan], tensors: dict[str, Tensor] | None = None) -> Fit:
    """The fit of a method that keeps a known number of neurons in each layer."""
    drops = tuple(1 - (one.kept or 0) / one.width for one in layers)
    return Fit(layers=tuple(layers), predicted_drop=drops, realised_drop=drops, tensors=tensors or {})


def threshold_fit(
    thresholds: Sequence[float],
    widths: Sequence[int],
    *,
    predicted: Sequence[float],
    realised: Sequence[float],
    tensors: dict[str, Tensor] | None = None,
) -> Fit:
    """The fit of a method that keeps what reaches a threshold of each layer."""
    pairs = zip(thresholds, widths, strict=True)
    return Fit(
        layers=tuple(LayerPlan(layer=i, width=width, threshold=found) for i, (found, width) in enumerate(pairs)),
        predicted_drop=tuple(predicted),
        realised_drop=tuple(realised),
        tensors={"thresholds": torch.tensor(list(thresholds), dtype=torch.float64)} | (tensors or {}),
    )


def histogram_fit(
    scores: Sequence[LogHistogram],
    calibration: Calibration,
    drops: Sequence[float],
    tensors: dict[str, Tensor] | None = None,
) -> Fit:
    """Thresholds at each layer's quantile of its scores, counted in histograms."""
    thresholds = [one.quantile(drop) if drop > 0 else 0.0 for one, drop in zip(scores, drops, strict=True)]
    realised = [share_below(*one.trimmed(), found) for one, found in zip(scores, thresholds, strict=True)]
    return threshold_fit(thresholds, calibration.widths, predicted=drops, realised=realised, tensors=tensors)


def threshold_of(layer: int, fit: Fit) -> float:
    """The threshold that a fit found for a layer."""
    threshold = fit.of(layer).threshold
    assert threshold is not None
    return threshold
