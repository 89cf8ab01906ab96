"""Products with weights stored one row an output: dense, gated, by a list, and those that decide or skip rows."""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.cuda.launcher import ACTIVATIONS, Launcher, Norm, Tuning
from actsparse.engine.cuda.structures import RowsArgs
from actsparse.engine.step.state import Best


class RowsMode(IntEnum):
    """What a product with output rows does with its results; mirrors kernels/rows.cu."""

    STORE = 0
    RESIDUAL = 1
    GATED = 2
    THRESHOLD = 3
    KEPT = 4
    BEST = 5


class Caps(NamedTuple):
    """What logits are multiplied by, and what they are soft-capped at (0: not)."""

    scale: float = 1.0
    cap: float = 0.0


class RowProducts(Launcher):
    """The kernel of rows.cu; `blocks` is how many candidates `head` leaves. x may be sums in fixed point."""

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        super().__init__(device, tuning)
        self.blocks = self._sms * self._tuning.rows_blocks_per_sm

    def _rows(
        self,
        mode: RowsMode,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        rows: int | None = None,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        factor: Tensor | None = None,
        fill: Tensor | None = None,
        threshold: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        second: int = 0,
        activation: str = "identity",
        best: Best | None = None,
        scale: float = 1.0,
        cap: float = 0.0,
        fresh: bool = False,
        read: Tensor | None = None,
    ) -> None:
        args = RowsArgs(
            weight=native.address(weight),
            x=native.address(x),
            norm=native.address(norm.weight) if norm else None,
            bias=native.address(bias),
            factor=native.address(factor),
            fill=native.address(fill),
            threshold=native.address(threshold),
            index=native.address(index),
            count=native.address(count),
            out=native.address(out),
            best_value=native.address(best.value) if best else None,
            best_row=native.address(best.row) if best else None,
            read=native.address(read),
            stride=weight.stride(0),
            second=second,
            epsilon=norm.epsilon if norm else 0.0,
            scale=scale,
            cap=cap,
            fresh=int(fresh),
            rows=weight.shape[0] if rows is None else rows,
            width=x.numel(),
            activation=ACTIVATIONS[activation],
            threshold_step=0 if threshold is None or threshold.numel() == 1 else 1,
            fixed_x=int(x.dtype == torch.int64),
            fixed_out=int(out.dtype == torch.int64),
        )
        self._library.rows(
            args,
            weight.dtype,
            mode,
            blocks=self.blocks,
            threads=self._tuning.rows_threads,
            deep=self._tuning.rows_deep,
            dependent=self._starts_early(),
        )

    def project(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        fresh: bool = False,
    ) -> None:
        """out [rows] = weight [rows, width] times norm(x) [width], plus bias [rows].

        With `index` only its first `count` [1] rows are computed, and the others of `out` stay; `fresh` where this step
        made them.
        """
        rows = None if index is None else index.numel()
        self._rows(
            RowsMode.STORE, out, x, weight, rows=rows, norm=norm, bias=bias, index=index, count=count, fresh=fresh
        )

    def add(self, out: Tensor, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: float = 1.0) -> None:
        """out [rows] += scale * (weight [rows, width] times x [width], plus bias [rows])."""
        self._rows(RowsMode.RESIDUAL, out, x, weight, bias=bias, scale=scale)

    def gated(
        self,
        out: Tensor,
        x: Tensor,
        gate_up: Tensor,
        *,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
        fill: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        fresh: bool = False,
    ) -> None:
        """out [neurons] = act(gate x) * (up x) - fill; gate_up [2 * neurons, width], gate rows first, bias likewise.

        With `index` [capacity], out_i is neuron index_i; with `count` [1], only the first `count` are read and written;
        `fresh` where this step made them. `mask` is for batches.
        """
        assert mask is None, "what one sequence does not keep is not in its list"
        neurons = gate_up.shape[0] // 2
        live = neurons if index is None else index.numel()
        self._rows(
            RowsMode.GATED,
            out,
            x,
            gate_up,
            rows=live,
            norm=norm,
            bias=bias,
            fill=fill,
            index=index,
            count=count,
            second=neurons,
            activation=activation,
            fresh=fresh,
        )

    def threshold(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        threshold: Tensor,
        *,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
    ) -> None:
        """out [rows] = v where |v| >= threshold, else 0; v = act(weight x + bias); one threshold or one per row."""
        self._rows(
            RowsMode.THRESHOLD,
            out,
            x,
            weight,
            norm=norm,
            threshold=threshold,
            activation=activation,
            bias=bias,
        )

    def kept(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        factor: Tensor,
        *,
        norm: Norm | None,
        activation: str,
        bias: Tensor | None = None,
        fill: Tensor | None = None,
        read: Tensor | None = None,
    ) -> None:
        """out [rows] = factor * act(weight x + bias) - fill where factor [rows] is not 0, else 0.

        Other rows are not read; `read` [1] int64 gains how many were.
        """
        self._rows(
            RowsMode.KEPT,
            out,
            x,
            weight,
            norm=norm,
            factor=factor,
            activation=activation,
            bias=bias,
            fill=fill,
            read=read,
        )

    def head(
        self, logits: Tensor, best: Best, x: Tensor, weight: Tensor, *, norm: Norm, caps: Caps | None = None
    ) -> None:
        """logits [vocab] = weight times norm(x), scaled and capped, and every block's largest of them in `best`."""
        scale, cap = caps or Caps()
        self._rows(RowsMode.BEST, logits, x, weight, norm=norm, best=best, scale=scale, cap=cap)
