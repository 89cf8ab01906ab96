"""The operators for a batch of up to eight sequences: every weight row is read once, whatever the batch.

Tensors are those of `Operators` with a sequence a row: x and out are [batch, n], rows apart by multiples of 16 bytes.
Norms are kernels of their own here, so that the many blocks of a product do not each read the residual twice.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.cuda.column_products import TILE, Epilogue, segments_of
from actsparse.engine.cuda.launcher import ACTIVATIONS, Norm, Tuning
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.cuda.row_products import Caps, RowsMode
from actsparse.engine.cuda.structures import BatchColumnsArgs, BatchRowsArgs, NormArgs
from actsparse.engine.step.state import Best
from actsparse.errors import ActsparseError

SLICE_INPUTS = 12 * 1024  # of a batch, that a block of a product takes which may be cut by its inputs
CHUNK = 64  # inputs that a warp takes at once; mirrors kernels/batch_rows.cu


class BatchCut(NamedTuple):
    """Blocks of the sparse product of a batch: tiles of 256 * groups outputs, each in slices of the inputs.

    `room`: for how many sequences.
    """

    room: int
    groups: int
    tiles: int
    slices: int


class BatchOperators(Operators):
    """All kernels, the products being those of batches of `batch` sequences."""

    def __init__(self, device: torch.device, batch: int, tuning: Tuning | None = None) -> None:
        super().__init__(device, tuning)
        self.batch = batch
        self.blocks = self._sms * self._tuning.batch_blocks_per_sm
        self._normed: dict[int, Tensor] = {}

    def _input(self, x: Tensor, norm: Norm | None, *, again: bool = False) -> Tensor:
        """x [batch, width], floats or sums in fixed point; normed into floats where there is a norm.

        `again`: x and norm are those of the last call, whose result still stands.
        """
        if norm is None:
            return x
        width = x.shape[1]
        if again:
            return self._normed[width]
        if width not in self._normed:
            self._normed[width] = torch.zeros(self.batch, width, device=x.device)
        out = self._normed[width]
        args = NormArgs(
            x=native.address(x),
            weight=native.address(norm.weight),
            out=native.address(out),
            epsilon=norm.epsilon,
            width=width,
            fixed=int(x.dtype == torch.int64),
        )
        self._library.norm(args, batch=self.batch, dependent=self._starts_early())
        return out

    def _batch_rows(
        self,
        mode: RowsMode,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        rows: int,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        factor: Tensor | None = None,
        threshold: Tensor | None = None,
        mask: Tensor | None = None,
        count: Tensor | None = None,
        second: int = 0,
        activation: str = "identity",
        best: Best | None = None,
        scale: float = 1.0,
        cap: float = 0.0,
        read: Tensor | None = None,
    ) -> None:
        x = self._input(x, norm, again=mode is RowsMode.KEPT)
        slices = self._slices(x.shape[1]) if mode is RowsMode.RESIDUAL else 1
        args = BatchRowsArgs(
            weight=native.address(weight),
            x=native.address(x),
            bias=native.address(bias),
            factor=native.address(factor),
            threshold=native.address(threshold),
            mask=native.address(mask),
            count=native.address(count),
            out=native.address(out),
            best_value=native.address(best.value) if best else None,
            best_row=native.address(best.row) if best else None,
            read=native.address(read),
            stride=weight.stride(0),
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            factor_stride=0 if factor is None else factor.stride(0),
            mask_stride=0 if mask is None else mask.stride(0),
            scale=scale,
            cap=cap,
            batch=self.batch,
            second=second,
            rows=rows,
            width=x.shape[1],
            activation=ACTIVATIONS[activation],
            threshold_step=0 if threshold is None or threshold.numel() == 1 else 1,
        )
        self._library.batch_rows(
            args,
            weight.dtype,
            mode,
            blocks=self.blocks if mode in (RowsMode.BEST, RowsMode.KEPT) else max(1, self.blocks // slices),
            slices=slices,
            depth=self._tuning.batch_depth,
            dependent=self._starts_early(),
        )

    def _slices(self, width: int) -> int:
        """How many blocks share the inputs of a product whose results are added up."""
        return max(1, min(math.ceil(self.batch * width / SLICE_INPUTS), math.ceil(width / CHUNK)))

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
        """out [batch, rows] = weight [rows, width] times norm(x) [batch, width], plus bias; added where out is sums."""
        _refuse(index, count)
        mode = RowsMode.RESIDUAL if out.dtype == torch.int64 else RowsMode.STORE
        self._batch_rows(mode, out, x, weight, rows=weight.shape[0], norm=norm, bias=bias)

    def add(self, out: Tensor, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: float = 1.0) -> None:
        """out [batch, rows], sums in fixed point, += scale * (weight [rows, width] times x [batch, width] + bias)."""
        _check_sums(out)
        self._batch_rows(RowsMode.RESIDUAL, out, x, weight, rows=weight.shape[0], bias=bias, scale=scale)

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
        """out [batch, neurons] = act(gate x) * (up x) * mask [batch, neurons]; only the first `count` [1] of them."""
        _refuse(fill, index)
        neurons = gate_up.shape[0] // 2
        self._batch_rows(
            RowsMode.GATED,
            out,
            x,
            gate_up,
            rows=neurons,
            norm=norm,
            bias=bias,
            mask=mask,
            count=count,
            second=neurons,
            activation=activation,
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
        """out [batch, rows] = v where |v| >= threshold, else 0; v = act(weight x + bias)."""
        self._batch_rows(
            RowsMode.THRESHOLD,
            out,
            x,
            weight,
            rows=weight.shape[0],
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
        """out [batch, rows] = factor [batch, rows] * act(weight x + bias); rows that are 0 in all are not read.

        `threshold` made the factor of the same norm(x) just before.
        """
        _refuse(fill)
        self._batch_rows(
            RowsMode.KEPT,
            out,
            x,
            weight,
            rows=weight.shape[0],
            norm=norm,
            factor=factor,
            activation=activation,
            bias=bias,
            read=read,
        )

    def head(
        self, logits: Tensor, best: Best, x: Tensor, weight: Tensor, *, norm: Norm, caps: Caps | None = None
    ) -> None:
        """logits [batch, vocab] = weight times norm(x), scaled and capped; a block's best in best [batch, blocks]."""
        scale, cap = caps or Caps()
        self._batch_rows(
            RowsMode.BEST, logits, x, weight, rows=weight.shape[0], norm=norm, best=best, scale=scale, cap=cap
        )

    def columns(
        self,
        out: Tensor,
        x: Tensor,
        weight_rows: Tensor,
        *,
        epilogue: Epilogue = Epilogue.ADD,
        skip_zeros: bool = True,
        threshold: Tensor | None = None,
        segments: tuple[int, ...] | None = None,
        score: Tensor | None = None,
        up: Tensor | None = None,
        activation: str = "identity",
        norm: Norm | None = None,
        squares: Tensor | None = None,
        bias: Tensor | None = None,
        fill: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        fresh: bool = False,
        invert: bool = False,
        keeps_nan: bool = False,
        scale: float = 1.0,
        zero: Tensor | None = None,
        read: Tensor | None = None,
    ) -> None:
        """out [batch, outputs], sums in fixed point, += scale * sum of x_i * weight_rows[i] over what a sequence keeps.

        A row is read if any sequence keeps its input; zeros never count. The other arguments are as in `Operators`:
        x [batch, inputs] and `up` are both sums in fixed point, or x is floats and there is no `up`.
        """
        _check_sums(out)
        _refuse(fill, index)
        x = self._input(x, norm)
        lengths = (weight_rows.shape[1],) if segments is None else segments
        cut = self._batch_cut(lengths, x.shape[1])
        args = BatchColumnsArgs(
            weight=native.address(weight_rows),
            x=native.address(x),
            up=native.address(up),
            score=native.address(score),
            threshold=native.address(threshold),
            count=native.address(count),
            bias=native.address(bias),
            out=native.address(out),
            zero=native.address(zero),
            read=native.address(read),
            stride=weight_rows.stride(0),
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            scale=scale,
            batch=self.batch,
            inputs=x.shape[1],
            outputs=weight_rows.shape[1],
            slices=cut.slices,
            segments=len(lengths),
            activation=ACTIVATIONS[activation],
            ahead=self._tuning.ahead,
            fixed=int(x.dtype == torch.int64),
            zeros=0 if zero is None else zero.numel(),
            segment=segments_of(lengths, cut.groups),
        )
        self._library.batch_columns(
            args, weight_rows.dtype, room=cut.room, tiles=cut.tiles, dependent=self._starts_early()
        )

    def _batch_cut(self, lengths: tuple[int, ...], inputs: int) -> BatchCut:
        """How a sparse product is cut into blocks that fill the chip, each with room for its lists."""
        tuning = self._tuning
        room = 2 if self.batch <= 2 else 4 if self.batch < tuning.tensor_columns_from else 8
        groups = 2 if room == 2 else 1
        tiles = sum(math.ceil(length / (TILE * groups)) for length in lengths)
        filling = min(self._sms * tuning.columns_blocks_per_sm // tiles, inputs // 32)
        slices = max(1, filling, fewest_slices(inputs, room, tuning.batch_columns_shared))
        return BatchCut(room=room, groups=groups, tiles=tiles, slices=slices)


def fewest_slices(inputs: int, room: int, most: int) -> int:
    """Into how many slices the inputs of a sparse product have to be cut, so that a block takes `most` bytes at most.

    A warp's list holds a value for each of `room` sequences and a place a row; mirrors kernels/batch_columns.cu.
    """
    warps, ring = (8, 8704) if room == 8 else (16, 4096)
    rows = (most - warps * ring) // (warps * 4 * (room + 1)) - 8  # of a warp
    return math.ceil(inputs / (warps * rows))


def _refuse(*given: Tensor | None) -> None:
    """Raise where an argument is given that the kernels of a batch do not know."""
    if any(one is not None for one in given):
        raise ActsparseError("the products of a batch take no lists of neurons and no fill", "decode one by one")


def _check_sums(out: Tensor) -> None:
    if out.dtype != torch.int64:
        raise ActsparseError("the products of a batch add to sums in fixed point", "give new_sums(...)")
