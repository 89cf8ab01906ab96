"""Gates at work on one batch of sequences: what they have seen of the prompt, and the edits that they make.

A gate edits the input of the projection that reads its units: neurons that of `down`, channels that of their own
projection, KV groups that of `o`. Masked runs, probes and generation all ask for the same edits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.methods.gates import (
    ChannelRule,
    FixedGate,
    HeadGate,
    LayerGates,
    NeuronGate,
    PrefillGate,
    Statistic,
    TokenGate,
)
from actsparse.results import Site, SiteKind, Unit


class SiteValues:
    """The values last seen at the sites that rules read, in the layer at work and the one before it."""

    routed: Bool[Tensor, "batch seq"] | None = None
    """The tokens of the expert at work; None where every token passes."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, SiteKind], Tensor] = {}

    def see(self, site: Site, x: Float[Tensor, "batch seq width"]) -> None:
        """Keep the values of a site; those of two layers ago are let go."""
        self._values[site.layer, site.kind] = x
        self._values.pop((site.layer - 2, site.kind), None)

    def of(self, gate: PrefillGate | TokenGate | HeadGate, layer: int) -> Float[Tensor, "batch seq width"]:
        """What the gate of a layer reads: its site, there or in the layer before."""
        ahead = 0 if isinstance(gate, PrefillGate) else gate.ahead
        return self._values[max(0, layer - ahead), gate.site]


@dataclass(frozen=True)
class Edit:
    """What a gate makes of the input of a projection: the mask of its units [batch, seq, units], the input that is
    left, and the correction (U, V) that adds U V^T (x - kept) to the output."""

    mask: Bool[Tensor, "batch seq units"]
    kept: Float[Tensor, "batch seq in"]
    correction: tuple[Tensor, Tensor] | None = None

    def added(self, x: Float[Tensor, "batch seq in"]) -> Float[Tensor, "batch seq out"] | None:
        """What is added to the output of the projection whose whole input was x."""
        if self.correction is None:
            return None
        outer, inner = (one.to(device=x.device, dtype=x.dtype) for one in self.correction)
        return (x - self.kept) @ inner @ outer.T


class PlanState:
    """The gates of every layer over one batch of sequences that share prompt length and positions.

    In a model with experts a plan over neurons has gates for every FFN, and `layer` is its place; a plan over anything
    else has them for every layer, and nothing for the FFNs beyond.
    """

    def __init__(self, gates: Sequence[LayerGates], *, prompt_length: int, sink_tokens: int) -> None:
        self.gates = list(gates)
        self.neurons = [
            None
            if layer.neurons is None
            else GateState(layer.neurons, prompt_length=prompt_length, sink_tokens=sink_tokens)
            for layer in gates
        ]

    def observe(self, layer: int, values: SiteValues, start: int, padding: Sequence[int] = ()) -> None:
        """See the activations of positions `start` and on, see `GateState.observe`."""
        state = self.neurons[layer] if layer < len(self.neurons) else None
        if state is not None and isinstance(state.gate, PrefillGate):
            state.observe(values.of(state.gate, layer), start, padding, values.routed)

    def edit(self, unit: Unit, layer: int, x: Tensor, values: SiteValues, sparse: slice) -> Edit | None:
        """The edit of the input x [batch, seq, width] at its positions `sparse`; None without a gate for the unit."""
        if layer >= len(self.gates):
            return None
        gates, part = self.gates[layer], x[:, sparse]
        if unit is Unit.NEURON:
            state = self.neurons[layer]
            return None if state is None else neuron_edit(state, x, values, layer, sparse)
        if unit is Unit.KV_GROUP:
            return (
                None if gates.heads is None else head_edit(gates.heads, part, values.of(gates.heads, layer)[:, sparse])
            )
        rule = gates.rules.get(unit)
        return None if rule is None else channel_edit(rule, part)


def neuron_edit(state: "GateState", a: Tensor, values: SiteValues, layer: int, sparse: slice) -> Edit:
    """Dropped neurons are 0, or what the gate fills in."""
    read = a if isinstance(state.gate, FixedGate) else values.of(state.gate, layer)
    part = a[:, sparse]
    mask = state.masks(read, sparse, a.shape[-1]).expand_as(part)
    fill = state.gate.fill
    return Edit(mask, torch.where(mask, part, 0.0 if fill is None else fill.to(device=a.device, dtype=a.dtype)))


def channel_edit(rule: ChannelRule, x: Float[Tensor, "batch seq in"]) -> Edit:
    """Dropped channels are 0, in the rule's own basis."""
    if rule.basis is None:
        mask = rule.rule.keep(x)
        return Edit(mask, torch.where(mask, x, 0.0), rule.correction)
    basis = rule.basis.to(device=x.device, dtype=x.dtype)
    rotated = x @ basis
    mask = rule.rule.keep(rotated)
    # rotating there and back costs rounding, which a token that keeps everything need not pay
    whole = mask.all(dim=-1, keepdim=True)
    return Edit(mask, torch.where(whole, x, torch.where(mask, rotated, 0.0) @ basis.T), rule.correction)


def head_edit(gate: HeadGate, x: Float[Tensor, "batch seq heads_width"], read: Tensor) -> Edit:
    """The heads of dropped groups add nothing; heads of a group lie side by side."""
    mask = gate.rule.keep(read)
    wide = mask.repeat_interleave(x.shape[-1] // mask.shape[-1], dim=-1)
    return Edit(mask, torch.where(wide, x, 0.0))


class GateState:
    """The state of a neuron gate over one batch of sequences."""

    def __init__(self, gate: NeuronGate, *, prompt_length: int, sink_tokens: int) -> None:
        self.gate = gate
        self.prompt_length = prompt_length
        self.sink_tokens = sink_tokens
        self._statistics: list[Statistic] = []
        self._seen: list[int] = []
        self._chosen: Bool[Tensor, "batch neurons"] | None = None
        self._decoded = 0

    def observe(
        self,
        read: Float[Tensor, "batch seq width"],
        start: int,
        padding: Sequence[int] = (),
        routed: Bool[Tensor, "batch seq"] | None = None,
    ) -> None:
        """See the activations at the gate's site of positions `start` and on; only prompt tokens after the sink tokens
        count.

        `padding`: how many positions of padding stand in front of each sequence; `routed`: the tokens that an expert
        serves (None: all).
        """
        if not isinstance(self.gate, PrefillGate) or start >= self.prompt_length:
            return
        if not self._seen:
            self._statistics = [self.gate.statistic() for _ in range(read.shape[0])]
            self._seen = [0] * read.shape[0]
        for index, sequence in enumerate(read):
            left = padding[index] if padding else 0
            seen = slice(max(0, left + self.sink_tokens - start), self.prompt_length - start)
            rows = sequence[seen] if routed is None else sequence[seen][routed[index, seen]]
            if len(rows):
                self._statistics[index].add(rows)
                self._seen[index] += len(rows)

    def masks(
        self, read: Float[Tensor, "batch seq width"], sparse: slice, neurons: int
    ) -> Bool[Tensor, "batch #seq neurons"]:
        """Masks for the positions `sparse` ([batch, 1, neurons]: the same for all). To be asked once a position.

        `read`: the values at the gate's site (any for a fixed one); `neurons`: how many the layer has.
        A prompt of sink tokens alone shows nothing to choose from: everything is kept.
        """
        if isinstance(self.gate, FixedGate):
            return self.gate.mask.to(read.device).expand(read.shape[0], 1, -1)
        if isinstance(self.gate, TokenGate):
            return self.gate.rule.keep(read[:, sparse])
        if self.gate.refresh_every:
            return self._refreshed(read[:, sparse], neurons)
        return self.chosen()[:, None, :] if self.ready else read.new_ones(len(read), 1, neurons, dtype=torch.bool)

    def _refreshed(self, read: Float[Tensor, "batch seq width"], neurons: int) -> Bool[Tensor, "batch seq neurons"]:
        """A decoded token that is due runs dense and joins the statistic; the next ones use what it chose."""
        masks = read.new_ones(len(read), read.shape[1], neurons, dtype=torch.bool)
        for index in range(read.shape[1]):
            if self.due():
                self.join(read[:, index])
            elif self.ready:
                masks[:, index] = self.chosen()
        return masks

    def due(self) -> bool:
        """Count a decoded token; whether it is one of every `refresh_every` that run dense, to `join`."""
        every = self.gate.refresh_every if isinstance(self.gate, PrefillGate) else None
        if not every:
            return False
        self._decoded += 1
        return self._decoded % every == 0

    def join(self, read: Float[Tensor, "batch width"]) -> None:
        """See the activations of a decoded token that ran dense; the masks are chosen again."""
        for sequence, statistic in enumerate(self._statistics):
            statistic.add(read[sequence : sequence + 1])
            self._seen[sequence] += 1
        self._chosen = None

    def chosen(self) -> Bool[Tensor, "batch neurons"]:
        """The masks that the prompts chose; decided once, and again after a refresh. A prompt that showed nothing
        keeps everything."""
        assert isinstance(self.gate, PrefillGate)
        if self._chosen is None:
            rule, pairs = self.gate.rule, zip(self._statistics, self._seen, strict=True)
            found = [rule(statistic.value()) if seen else None for statistic, seen in pairs]
            whole = torch.ones_like(next(mask for mask in found if mask is not None))
            self._chosen = torch.stack([whole if mask is None else mask for mask in found])
        return self._chosen

    @property
    def ready(self) -> bool:
        """Whether any prompt showed anything to choose from."""
        return not isinstance(self.gate, PrefillGate) or any(self._seen)


def units_of(plans: Sequence[Sequence[LayerGates]]) -> frozenset[Unit]:
    """The units that any gate of these plans decides about."""
    layers = [layer for plan in plans for layer in plan]
    found = {unit for layer in layers for unit in layer.rules}
    found |= {Unit.NEURON} if any(layer.neurons for layer in layers) else set()
    return frozenset(found | ({Unit.KV_GROUP} if any(layer.heads for layer in layers) else set()))


EDITED: Mapping[Unit, SiteKind] = {Unit.NEURON: SiteKind.NEURON, Unit.KV_GROUP: SiteKind.ATTN_OUT}
READER: Mapping[Unit, Unit] = {Unit.NEURON: Unit.DOWN, Unit.KV_GROUP: Unit.O}
"""The site that units other than channels are edited at, and the projection that reads it."""
