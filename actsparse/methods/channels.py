"""What methods over input channels have in common: rules for every projection, fitted on its own input."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from actsparse.core.allocate import Curve, by_sensitivity, greedy
from actsparse.core.masks import kept_count
from actsparse.core.quantiles import LogHistogram
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, drops_by_layer
from actsparse.methods.channel_replay import ChannelReplay, Place
from actsparse.methods.gates import ChannelGate, ChannelRule, LayerGates, Threshold, TopK
from actsparse.results import LayerPlan, SiteKind, Unit

ALL_PROJECTIONS = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
OF_MLP = frozenset({Unit.GATE, Unit.UP, Unit.GATE_UP, Unit.DOWN})
CURVE_SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)

Mode = Literal["threshold", "topk"]
Allocation = Literal["uniform", "greedy", "sensitivity"]


@dataclass(frozen=True, kw_only=True)
class ChannelMethod(Method, ABC):
    """Keeps the input channels with the largest scores |x_j| * w_j of each projection, token by token.

    `mode`: over a threshold, the exact quantile of the scores at the share to drop, or exactly the top k. `allocation`
    of the share over projections: the same everywhere, greedy within each layer, or by sensitivity over all of them.
    """

    mode: Mode = "threshold"
    allocation: Allocation = "uniform"

    decides = Decides.TOKEN
    needs = (SiteKind.ATTN_IN, SiteKind.ATTN_OUT, SiteKind.MLP_IN, SiteKind.NEURON)
    saves = ALL_PROJECTIONS

    @property
    def needs_replay(self) -> bool:
        return True

    @abstractmethod
    def weights(self, replay: ChannelReplay) -> dict[Place, Tensor]:
        """What magnitudes are multiplied by at each projection [in]; none for weights of 1."""

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        replay = calibration.channels()
        drops = drops_by_layer(budget, self.name, replay.layers)
        weights = self.weights(replay)
        counted = self.mode == "threshold" or self.allocation != "uniform"
        scores = replay.scores(weights) if counted and max(drops) > 0 else {}
        shares = Allocator(replay, weights, scores, self.mode).shares(drops, self.allocation)
        tensors = {_named(place): one for place, one in weights.items()}
        if self.mode == "topk":
            return topk_fit(replay, shares, tensors)
        wanted = {place: share for place, share in shares.items() if share > 0}
        found = replay.quantiles(scores, weights, wanted) if wanted else {}
        layers, realised = [], []
        for layer, unit in shares:
            threshold, below = found.get((layer, unit), (0.0, 0.0))
            layers.append(LayerPlan(layer=layer, unit=unit, width=replay.widths[unit], threshold=threshold))
            realised.append(below)
        return Fit(
            layers=tuple(layers), predicted_drop=tuple(shares.values()), realised_drop=tuple(realised), tensors=tensors
        )

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        entries = [one for one in fit.layers if one.layer == layer]
        rules = {one.unit: self.rule(one, fit) for one in entries}
        return LayerGates(channels=ChannelGate(rules)) if rules else LayerGates()

    def rule(self, entry: LayerPlan, fit: Fit) -> ChannelRule:
        """The rule of one projection."""
        return ChannelRule(rule_of(entry, fit.tensors.get(_named((entry.layer, entry.unit)))))


def rule_of(entry: LayerPlan, weights: Tensor | None) -> Threshold | TopK:
    """What an entry of a fit keeps: over its threshold, or its top k."""
    if entry.threshold is not None:
        return Threshold(entry.threshold, weights)
    assert entry.kept is not None
    return TopK(entry.kept, weights)


def topk_fit(replay: ChannelReplay, shares: Mapping[Place, float], tensors: dict[str, Tensor]) -> Fit:
    """The fit that keeps the exact count of each projection's share."""
    layers = [
        LayerPlan(layer=layer, unit=unit, width=(width := replay.widths[unit]), kept=kept_count(1 - share, width))
        for (layer, unit), share in shares.items()
    ]
    drops = tuple(1 - (one.kept or 0) / one.width for one in layers)
    return Fit(layers=tuple(layers), predicted_drop=drops, realised_drop=drops, tensors=tensors)


def column_norms(replay: ChannelReplay) -> dict[Place, Tensor]:
    """||W[:, j]|| of every projection [in], in float32."""
    return {
        (layer, unit): replay.matrix(layer, unit).norm(dim=0).cpu()
        for layer in range(replay.layers)
        for unit in replay.widths
    }


@dataclass(frozen=True)
class Allocator:
    """Shares a budget over the projections of each layer, or of all."""

    replay: ChannelReplay
    weights: Mapping[Place, Tensor]
    scores: Mapping[Place, LogHistogram]
    mode: Mode

    def shares(self, drops: Sequence[float], allocation: Allocation) -> dict[Place, float]:
        """The share that each projection drops; `drops` by layer."""
        units = list(self.replay.widths)
        if allocation == "uniform" or max(drops) == 0:
            return {(layer, unit): drops[layer] for layer in range(self.replay.layers) for unit in units}
        if allocation == "greedy":
            return self._greedy(drops, units)
        return self._by_sensitivity(sum(drops) / len(drops), units)

    def _greedy(self, drops: Sequence[float], units: list[Unit]) -> dict[Place, float]:
        sizes, found = [self.replay.sizes[unit] for unit in units], {}
        for layer in self.replay.each_layer("allocating channels greedily"):

            def error(shares: Sequence[float], layer: int = layer) -> float:
                return self.replay.block_error(layer, self._gates(layer, dict(zip(units, shares, strict=True))))

            for unit, share in zip(units, greedy(sizes, drops[layer], error), strict=True):
                found[layer, unit] = share
        return found

    def _by_sensitivity(self, drop: float, units: list[Unit]) -> dict[Place, float]:
        places = [(layer, unit) for layer in range(self.replay.layers) for unit in units]
        curves = []
        for layer in self.replay.each_layer("measuring sensitivity"):
            for unit in units:
                errors = [self.replay.block_error(layer, self._gates(layer, {unit: at})) for at in CURVE_SHARES]
                curves.append(Curve((0.0, *CURVE_SHARES), (0.0, *errors)))
        sizes = [self.replay.sizes[unit] for _, unit in places]
        return dict(zip(places, by_sensitivity(sizes, drop, curves), strict=True))

    def _gates(self, layer: int, shares: Mapping[Unit, float]) -> LayerGates:
        rules = {unit: ChannelRule(self._rule((layer, unit), share)) for unit, share in shares.items() if share > 0}
        return LayerGates(channels=ChannelGate(rules)) if rules else LayerGates()

    def _rule(self, place: Place, share: float) -> Threshold | TopK:
        weights = self.weights.get(place)
        if self.mode == "topk":
            return TopK(kept_count(1 - share, self.replay.widths[place[1]]), weights)
        return Threshold(self.scores[place].quantile(share), weights)


def _named(place: Place) -> str:
    return f"layers.{place[0]}.{place[1].value}.weights"
