"""Writes the operators of a step down in order, with the sizes and strides of the tensors that they are given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.engine.cpu.ops import ACTIVATIONS, Columns, Gated, Norm, Op, Rows, bfloat, chunks_of
from actsparse.engine.step import sliced
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import LayerWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """What a rule of a layer chose for the last token: [batch, units], 0 where it did not keep, or where it did with
    `of_dropped`."""

    layer: int
    unit: str
    values: Tensor
    of_dropped: bool = False

    @property
    def kept(self) -> Tensor:
        """[batch, units] bool; a unit whose value is exactly 0 adds nothing either way."""
        return (self.values != 0) ^ self.of_dropped


class Emitter:
    """The operators so far (`ops`), scratch that they share, and counters of what they will have read.

    What is written into the residual stream is multiplied by the family's residual scale. `records`: rules leave what
    they chose in `choices`, in buffers of their own.
    """

    def __init__(self, shape: Shape, state: DecodeState, *, records: bool = False) -> None:
        self.shape = shape
        self.batch = state.batch
        self.hidden = state.hidden
        self.ops: list[Op] = []
        self.counters: list[Counter] = []
        self.choices: list[Choice] = []
        self.records = records
        widest = max(sliced.capacity_for(shape.neurons), shape.width, shape.query_width)
        widest_out = max(widest, shape.qkv_width)
        self._scratch = torch.zeros(self.batch * (widest + chunks_of(widest) * widest_out))
        self._list = torch.zeros(widest, dtype=torch.int32)
        self._neurons = torch.zeros(self.batch * widest)

    def scale(self, out: Tensor) -> float:
        """What a result is multiplied by on its way into `out`."""
        return self.shape.residual_scale if out is self.hidden else 1.0

    def norm(self, x: Tensor, weight: Tensor, out: Tensor, *, scale: float = 1.0, add: int = 0) -> None:
        """An RMS norm, see `ops.Norm`."""
        shape = self.shape
        self.ops.append(
            Norm(
                x=x,
                weight=weight,
                out=out,
                batch=self.batch,
                width=shape.width,
                epsilon=shape.norm_epsilon,
                scale=scale,
                add=add,
            )
        )

    def rows(
        self, weight: Tensor, x: Tensor, out: Tensor, *, bias: Tensor | None = None, add: int = 0,
        scale: float | None = None, softcap: float = 0.0, index: Tensor | None = None, count: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A product that reads every row, or those listed, see `ops.Rows`."""
        self.ops.append(
            Rows(
                weight=weight,
                x=x,
                bias=bias,
                index=index,
                count=count,
                out=out,
                bfloat=bfloat(weight),
                batch=self.batch,
                rows=len(weight),
                width=weight.shape[1],
                stride=weight.stride(0),
                out_stride=out.stride(0),
                scale=self.scale(out) if scale is None else scale,
                add=add,
                softcap=softcap,
            )
        )

    def gated(
        self, layer: LayerWeights, x: Tensor, *, gate: Tensor | None = None, up: Tensor | None = None,
        gate_bias: Tensor | None = None, up_bias: Tensor | None = None, fill: Tensor | None = None,
        index: Tensor | None = None, count: Tensor | None = None, mask: Tensor | None = None, out: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The neurons of a gated MLP, see `ops.Gated`: the layer's own without `gate` and `up`."""
        shape = self.shape
        if gate is None or up is None:
            gate, up = layer.gate_up.chunk(2)
            gate_bias, up_bias = (None, None) if layer.gate_up_bias is None else layer.gate_up_bias.chunk(2)
        self.ops.append(
            Gated(
                gate=gate,
                up=up,
                x=x,
                gate_bias=gate_bias,
                up_bias=up_bias,
                fill=fill,
                index=index,
                count=count,
                mask=mask,
                out=self.compact(len(gate)) if out is None else out,
                bfloat=bfloat(gate),
                batch=self.batch,
                rows=len(gate),
                width=shape.width,
                stride=gate.stride(0),
                activation=ACTIVATIONS[shape.activation],
            )
        )

    def columns(
        self, layer: int, unit: str, weight: Tensor, x: Tensor, out: Tensor, *, base: Tensor | None = None,
        score: Tensor | None = None, threshold: Tensor | None = None, top: int = 0, index: Tensor | None = None,
        count: Tensor | None = None, keep: int = 0, dropped: Tensor | None = None, fill: Tensor | None = None,
        add: int = 0,
    ) -> None:  # fmt: skip
        """A product that skips inputs, counted as `unit` of `layer`, see `ops.Columns`."""
        inputs, outputs = weight.shape
        if self.records and not keep:
            dropped = self.floats(inputs)
            self.chose(layer, unit, dropped, of_dropped=True)
        self.ops.append(
            Columns(
                weight=weight,
                x=x,
                score=score,
                threshold=threshold,
                base=base,
                fill=fill,
                index=index,
                count=count,
                out=out,
                dropped=dropped,
                scratch=self._scratch,
                list=self._list,
                read=self.counter(layer, unit, inputs),
                bfloat=bfloat(weight),
                batch=self.batch,
                inputs=inputs,
                outputs=outputs,
                stride=weight.stride(0),
                # a copy of some neurons is summed in as many pieces as all of them, to the same bits
                chunks=chunks_of(self.shape.neurons if unit == "neuron" else inputs),
                keep=keep,
                top=top,
                out_stride=out.stride(0),
                add=add,
                scale=self.scale(out),
            )
        )

    def compact(self, rows: int) -> Tensor:
        """Room for the activations of `rows` neurons a sequence, at the front of one buffer."""
        return self._neurons[: self.batch * rows].view(self.batch, rows)

    def floats(self, width: int) -> Tensor:
        """A buffer of its own, [batch, width]."""
        return torch.zeros(self.batch, width)

    def chose(self, layer: int, unit: str, values: Tensor, *, of_dropped: bool = False) -> None:
        """Note where a rule leaves its choice, see `Choice`."""
        if self.records:
            self.choices.append(Choice(layer=layer, unit=unit, values=values, of_dropped=of_dropped))

    def counter(self, layer: int, unit: str, total: int) -> Tensor:
        """A new counter's number, [1] int64."""
        read = torch.zeros(1, dtype=torch.int64)
        self.counters.append(Counter(layer=layer, unit=unit, read=read, total=total))
        return read
