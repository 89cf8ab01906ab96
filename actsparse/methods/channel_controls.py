"""Controls of methods over input channels: one mask a projection for all text, drawn or by calibration text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Bool
from torch import Tensor

from actsparse.core.masks import top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, drops_by_layer
from actsparse.methods.channel_replay import ChannelReplay
from actsparse.methods.channels import ALL_PROJECTIONS, column_norms, topk_fit
from actsparse.methods.gates import ChannelGate, ChannelRule, Fixed, LayerGates
from actsparse.methods.random import Drawn
from actsparse.results import LayerPlan, Unit

Masks = Sequence[Bool[Tensor, " in"]]


@dataclass(frozen=True, kw_only=True)
class FixedChannels(Method, ABC):
    """Keeps the same k input channels of each projection at every token."""

    paper = "control"
    decides = Decides.OFFLINE
    needs = ()
    saves = ALL_PROJECTIONS
    is_control = True

    @property
    def needs_replay(self) -> bool:
        return True

    @abstractmethod
    def masks(self, replay: ChannelReplay, layers: Sequence[LayerPlan]) -> Masks:
        """What each entry keeps."""

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        replay = calibration.channels()
        drops = drops_by_layer(budget, self.name, replay.layers)
        shares = {(layer, unit): drops[layer] for layer in range(replay.layers) for unit in replay.widths}
        fit = topk_fit(replay, shares, {})
        masks = zip(fit.layers, self.masks(replay, fit.layers), strict=True)
        return replace(fit, tensors={_named(one.layer, one.unit): mask for one, mask in masks})

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        units = [one.unit for one in fit.layers if one.layer == layer]
        return LayerGates(
            channels=ChannelGate({unit: ChannelRule(Fixed(fit.tensors[_named(layer, unit)])) for unit in units})
        )


@dataclass(frozen=True, kw_only=True)
class ChannelsRandom(FixedChannels, Drawn):
    """k channels of each projection, drawn uniformly; without a seed, the mean of three seeds."""

    name = "channels-random"
    summary = "input channels drawn at random, mean of three seeds"

    def masks(self, replay: ChannelReplay, layers: Sequence[LayerPlan]) -> Masks:
        return self.drawn(layers)


@dataclass(frozen=True, kw_only=True)
class ChannelsStatic(FixedChannels):
    """The top k channels of each projection on calibration text by mean |x_j|*||W[:, j]|| (`mean_n`: what WINA ranks a
    token's by) or by mean |x_j| (`mean_abs`: TEAL)."""

    stat: Literal["mean_n", "mean_abs"] = "mean_n"

    name = "channels-static"
    summary = "top input channels of the calibration text, one mask for everything"

    def masks(self, replay: ChannelReplay, layers: Sequence[LayerPlan]) -> Masks:
        scores = dict(replay.mean_magnitudes())
        if self.stat == "mean_n":
            scores = {place: scores[place] * norms for place, norms in column_norms(replay).items()}
        return [top_mask(scores[one.layer, one.unit], one.kept or one.width) for one in layers]


def _named(layer: int, unit: Unit) -> str:
    return f"layers.{layer}.{unit.value}.mask"
