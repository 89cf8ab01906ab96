"""The rules that `auto` chooses from: each method's rule for one unit of one layer at one share, and its error."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Fit, Method
from actsparse.methods.channel_replay import ChannelReplay
from actsparse.methods.gates import ChannelGate, LayerGates, TokenGate
from actsparse.methods.registry import method_class
from actsparse.results import LayerPlan, Unit

SHARES = (0.15, 0.35, 0.5, 0.65, 0.8)
REFERENCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A rule of a method for one unit of one layer: the share that it drops, the error of the layer's output under it
    alone, the matrices that a dropped neuron saves, and the bytes that the rule itself reads."""

    layer: int
    unit: Unit
    rule: str | None
    dropped: float
    error: float
    entry: LayerPlan
    saves: frozenset[str] = frozenset()
    extra_bytes: int = 0

    @staticmethod
    def method_of(rule: str) -> Method:
        """The method whose rule it is."""
        return _method(rule.partition("@")[0])


@dataclass(frozen=True)
class Measured:
    """All candidates, and what an error of each layer's output is worth: nats of KL per squared relative error."""

    candidates: tuple[Candidate, ...]
    weights: tuple[float, ...]
    neurons: int
    fits: dict[str, Fit] = field(default_factory=dict)

    def by_unit(self, layer: int) -> dict[Unit, list[Candidate]]:
        """The candidates of a layer by unit; dropping nothing is one of them."""
        found: dict[Unit, list[Candidate]] = {}
        for one in self.candidates:
            if one.layer == layer:
                found.setdefault(one.unit, [nothing(one.entry)] if one.unit.is_projection else []).append(one)
        return {unit: best_by_share(options) for unit, options in found.items()}

    def tensors(self, pick: Candidate) -> dict[str, Tensor]:
        """The tensors that the rule of a candidate needs, named after it."""
        assert pick.rule is not None
        own = f"layers.{pick.layer}."
        named = f"{own}{pick.unit.value}."
        found = {}
        for name, one in self.fits[pick.rule].tensors.items():
            if name.startswith(named if pick.unit.is_projection else own):
                found[f"{pick.rule}/{name}"] = one
        return found


def nothing(like: LayerPlan) -> Candidate:
    """The candidate that drops nothing."""
    return Candidate(layer=like.layer, unit=like.unit, rule=None, dropped=0.0, error=0.0, entry=like)


def best_by_share(options: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates that drop about the same, the one with the least error; neurons keep every method's."""
    best: dict[tuple[float, frozenset[str]], Candidate] = {}
    for one in options:
        place = (round(one.dropped, 1), one.saves)
        if place not in best or one.error < best[place].error:
            best[place] = one
    return list(best.values())


def measure(names: Sequence[str], calibration: Calibration) -> Measured:
    """Fit every method at every share, and measure each rule alone in its layer; done once a calibration."""
    replay = calibration.channels()
    found = replay.kept(f"candidates of {'+'.join(names)}", lambda: _measure(names, calibration, replay))
    assert isinstance(found, Measured)
    return found


def _measure(names: Sequence[str], calibration: Calibration, replay: ChannelReplay) -> Measured:
    gated = "gate" in replay.step.mlp
    methods = {name: _method(name) for name in names}
    usable = {name: one for name, one in methods.items() if gated or not one.gated_only}
    if not usable:
        raise PlanError(f"auto: none of {', '.join(names)} serves a non-gated FFN", "write methods=teal+wina")
    fits = {
        f"{name}@{share:g}": method.fit(calibration, Budget(drop=share))
        for name, method in usable.items()
        for share in SHARES
    }
    candidates, weights = [], []
    for layer in replay.each_layer("measuring candidates"):
        mine = [one for rule, fit in fits.items() for one in _of_layer(rule, fit, layer, gated, replay)]
        candidates += mine
        weights.append(_weight(layer, fits, replay))
    return Measured(tuple(candidates), tuple(weights), calibration.widths[0], fits)


def _of_layer(rule: str, fit: Fit, layer: int, gated: bool, replay: ChannelReplay) -> list[Candidate]:
    gates = Candidate.method_of(rule).gates(layer, fit)
    shares = {(one.layer, one.unit): share for one, share in zip(fit.layers, fit.predicted_drop, strict=True)}
    found = []
    if gates.neurons is not None:
        saves = gates.neurons.unread(gated) if isinstance(gates.neurons, TokenGate) else gates.neurons.saves
        found.append(
            Candidate(
                layer=layer,
                unit=Unit.NEURON,
                rule=rule,
                dropped=shares[layer, Unit.NEURON],
                error=replay.block_error(layer, gates),
                entry=replace(fit.of(layer), rule=rule),
                saves=saves,
                extra_bytes=gates.extra_bytes,
            )
        )
    for unit, channel in gates.rules.items():
        alone = LayerGates(channels=ChannelGate({unit: channel}))
        found.append(
            Candidate(
                layer=layer,
                unit=unit,
                rule=rule,
                dropped=shares[layer, unit],
                error=replay.block_error(layer, alone),
                entry=replace(fit.of(layer, unit), rule=rule),
                extra_bytes=sum(one.numel() * one.element_size() for one in channel.correction or ()),
            )
        )
    return found


def _weight(layer: int, fits: dict[str, Fit], replay: ChannelReplay) -> float:
    """KL of the model's predictions per squared error of one layer, at a reference rule that acts there alone."""
    rule = next(name for name in fits if name.endswith(f"@{REFERENCE:g}"))
    gates = Candidate.method_of(rule).gates(layer, fits[rule])
    every = [gates if index == layer else LayerGates() for index in range(replay.layers)]
    error = replay.block_error(layer, gates)
    return replay.kl(every) / max(error * error, 1e-12)


@cache
def _method(name: str) -> Method:
    cls = method_class(name)
    method = cls()
    if method.takes_error_target or method.ideal or name == "auto":
        raise PlanError(f"auto: {name} has no rule that auto could mix", "use methods such as teal, wina, cats, chess")
    return method
