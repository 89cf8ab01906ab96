"""The MLP of a step, by what a plan does there: whole, by channels, over a list, decided, scored or routed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.engine.cpu.emit import Emitter
from actsparse.engine.cpu.ops import ACTIVATIONS, Decide, Multiply, NeuronSparse, bfloat
from actsparse.engine.cpu.projection import Projector
from actsparse.engine.cpu.routers import Routers
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.weights import LayerWeights
from actsparse.engine.step.work import Decided, LayerWork, Listed, Routed, Scored

HALVES = ("gate", "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """The MLP of one layer: its place, weights and work; x [batch, width] goes in, `target` [batch, width] gets the
    result, added to what is there with `add`."""

    index: int
    layer: LayerWeights
    work: LayerWork
    x: Tensor
    target: Tensor
    add: int


class MlpBuilder:
    """Emits MLPs. `halves` [batch, 2 * neurons]: room for gate and up side by side."""

    def __init__(self, shape: Shape, emit: Emitter, projector: Projector, routers: Routers, halves: Tensor) -> None:
        self._shape = shape
        self._emit = emit
        self._project = projector.project
        self._routers = routers
        self._halves = halves

    def emit(self, one: Branch, record: Tensor | None) -> None:
        """The MLP of a layer; `record` [batch, neurons] receives the activations of one that runs dense."""
        by_channels = bool(one.work.channels.keys() & set(HALVES))
        match one.work.mlp:
            case None:
                self._whole(one, by_channels, record)
            case Listed() as listed:
                self._listed(one, listed)
            case Decided() as decided if by_channels:
                self._decided_by_channels(one, decided)
            case Decided() as decided:
                self._decided(one, decided)
            case Scored() as scored:
                self._scored(one, scored, by_channels)
            case Routed() as routed:
                self._routed(one, routed)

    @property
    def _neurons(self) -> Tensor:
        return self._emit.compact(self._shape.neurons)

    def _whole(self, one: Branch, by_channels: bool, record: Tensor | None) -> None:
        neurons = self._neurons if by_channels or record is None else record
        if by_channels:
            for name in HALVES:
                self._half(one, name)
            self._multiply()
        else:
            self._emit.gated(one.layer, one.x, out=neurons)
        self._project(
            one.index, "down", one.work, one.layer.down, neurons, one.target, bias=one.layer.down_bias, add=one.add
        )

    def _half(self, one: Branch, name: str, index: Tensor | None = None, count: Tensor | None = None) -> None:
        """Gate or up into its half, by its channel rule, or over a list of neurons."""
        half = slice(0, self._shape.neurons) if name == "gate" else slice(self._shape.neurons, None)
        bias = None if one.layer.gate_up_bias is None else one.layer.gate_up_bias[half]
        weight, out = one.layer.gate_up[half], self._halves[:, half]
        if name in one.work.channels:
            self._project(one.index, name, one.work, weight, one.x, out, bias=bias)
        else:
            self._emit.rows(weight, one.x, out, bias=bias, index=index, count=count)

    def _multiply(self, mask: Tensor | None = None, fill: Tensor | None = None) -> None:
        self._emit.ops.append(
            Multiply(
                halves=self._halves,
                mask=mask,
                fill=fill,
                out=self._neurons,
                batch=self._emit.batch,
                neurons=self._shape.neurons,
                activation=ACTIVATIONS[self._shape.activation],
            )
        )

    def _listed(self, one: Branch, mlp: Listed) -> None:
        self._emit.gated(
            one.layer, one.x, gate=mlp.gate, up=mlp.up, gate_bias=mlp.gate_bias, up_bias=mlp.up_bias,
            fill=mlp.fill, index=mlp.index, count=mlp.count, mask=mlp.mask,
        )  # fmt: skip
        self._emit.columns(
            one.index, "neuron", mlp.down_rows, self._emit.compact(len(mlp.gate)), one.target,
            base=total(one.layer.down_bias, mlp.base), index=mlp.index, count=mlp.count, keep=1, add=one.add,
        )  # fmt: skip

    def _decided(self, one: Branch, mlp: Decided) -> None:
        shape, layer = self._shape, one.layer
        biases = (None, None) if layer.gate_up_bias is None else layer.gate_up_bias.chunk(2)
        order = slice(None) if mlp.gate_first else slice(None, None, -1)
        (first, second), (first_bias, second_bias) = layer.gate_up.chunk(2)[order], biases[order]
        out = self._emit.floats(shape.neurons) if self._emit.records else self._neurons
        self._emit.chose(one.index, "neuron", out)
        self._emit.ops.append(
            NeuronSparse(
                first=first,
                second=second,
                x=one.x,
                first_bias=first_bias,
                second_bias=second_bias,
                threshold=mlp.threshold,
                fill=mlp.fill,
                out=out,
                read=self._emit.counter(one.index, "second", shape.neurons),
                bfloat=bfloat(first),
                batch=self._emit.batch,
                rows=shape.neurons,
                width=shape.width,
                stride=first.stride(0),
                step=int(mlp.threshold.numel() > 1),
                activation=ACTIVATIONS[shape.activation],
                gate_first=int(mlp.gate_first),
            )
        )
        self._down_of_kept(one, mlp, out)

    def _decided_by_channels(self, one: Branch, mlp: Decided) -> None:
        """The same where gate or up skips channels too: the second one is read by kept channels, or by kept rows."""
        shape, batch = self._shape, self._emit.batch
        first, second = HALVES if mlp.gate_first else HALVES[::-1]
        self._half(one, first)
        begin = 0 if mlp.gate_first else shape.neurons
        decide = Decide(
            value=self._halves[:, begin : begin + shape.neurons],
            threshold=mlp.threshold,
            index=torch.zeros(shape.neurons, dtype=torch.int32),
            count=torch.zeros(1, dtype=torch.int32),
            mask=torch.zeros(batch, shape.neurons, dtype=torch.uint8),
            read=self._emit.counter(one.index, "second", shape.neurons),
            batch=batch,
            neurons=shape.neurons,
            stride=self._halves.stride(0),
            step=int(mlp.threshold.numel() > 1),
            activation=ACTIVATIONS[shape.activation if mlp.gate_first else "identity"],
        )
        self._emit.ops.append(decide)
        self._emit.chose(one.index, "neuron", decide.mask)
        self._half(one, second, decide.index, decide.count)
        self._multiply(decide.mask, mlp.fill)
        self._down_of_kept(one, mlp, self._neurons)

    def _down_of_kept(self, one: Branch, mlp: Decided, neurons: Tensor) -> None:
        self._emit.columns(
            one.index, "neuron", mlp.down_rows, neurons, one.target,
            base=total(one.layer.down_bias, mlp.base), keep=1, add=one.add,
        )  # fmt: skip

    def _scored(self, one: Branch, mlp: Scored, by_channels: bool) -> None:
        if by_channels:
            for name in HALVES:
                self._half(one, name)
            self._multiply()
        else:
            self._emit.gated(one.layer, one.x, out=self._neurons)
        # the rule decides on |a|; what is filled in stands in `base`, and is taken off what is kept
        self._emit.columns(
            one.index, "neuron", mlp.down_rows, self._neurons, one.target, base=total(one.layer.down_bias, mlp.base),
            score=mlp.score, threshold=mlp.threshold, top=mlp.top, fill=mlp.fill, add=one.add,
        )  # fmt: skip

    def _routed(self, one: Branch, mlp: Routed) -> None:
        layer, chosen = one.layer, self._routers.choose(one.index, mlp.router, self._shape.neurons, "router")
        gate, up = layer.gate_up.chunk(2)
        gate_bias, up_bias = (None, None) if layer.gate_up_bias is None else layer.gate_up_bias.chunk(2)
        mask = chosen.mask if self._emit.batch > 1 else None
        known = Listed(
            gate=gate, up=up, down_rows=mlp.down_rows, index=chosen.index, count=chosen.count, gate_bias=gate_bias,
            up_bias=up_bias, mask=mask, fill=mlp.fill, base=mlp.base,
        )  # fmt: skip
        self._listed(one, known)


def total(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two vectors of which either may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
