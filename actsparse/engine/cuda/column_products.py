"""Products with weights stored one row an input: rows of inputs that are dropped are not read."""

import ctypes
import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.cuda.launcher import ACTIVATIONS, Launcher, Norm, Tuning
from actsparse.engine.cuda.structures import ColumnsArgs, Segment

PARTIAL, TILES = 2**21, 2**14
TILE = 256  # outputs that a block owns, or twice as many


class Epilogue(IntEnum):
    """What a product with input rows does with its results; mirrors kernels/columns.cu."""

    WRITE = 0
    ADD = 1
    ATOMIC_ADD = 2


FIXED_ADD = 3  # to sums in fixed point, whatever the epilogue


class Cut(NamedTuple):
    """Blocks of the input-major kernel: tiles of 256 * groups outputs, each in slices of the inputs."""

    groups: int
    tiles: int
    slices: int


class ColumnProducts(Launcher):
    """The kernel of columns.cu."""

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        super().__init__(device, tuning)
        # Where slices of a product meet: room for every block's tile, and how many of a tile's blocks have arrived.
        self._partial = torch.zeros(PARTIAL, device=device)
        self._arrived = torch.zeros(TILES, dtype=torch.int32, device=device)

    def columns(
        self,
        out: Tensor,
        x: Tensor,
        weight_rows: Tensor,
        *,
        epilogue: Epilogue = Epilogue.WRITE,
        skip_zeros: bool = False,
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
        """out [outputs] = scale * sum of x_i * weight_rows[i] over the inputs kept; weight_rows [inputs, outputs].

        Without `threshold` and `skip_zeros` every input is read. `threshold` [segments] applies per segment of outputs
        (`segments` are their lengths), to |x_i| times `score` [segments, inputs] where given. `up`: x_i stands for
        act(x_i) * up_i. `index` [inputs]: the row of x_i; `count` [1]: live inputs; `fresh` where this step made them.
        fill [inputs] is taken off the values that are kept; `invert` keeps what is below the threshold. A value that
        is no number is dropped, or kept with `keeps_nan`, as where the threshold is that of the largest.
        ATOMIC_ADD adds in no fixed order. What is read before it is known to be kept is passed over later.
        `squares` [any]: parts of the sum of x_i * x_i, which spare the norm from reading all of x in every block.

        x and `up` may both be sums in fixed point, and so may `out`, which then gains the product: blocks add to it as
        they finish, to the same bits in any order. `zero`: such sums, of a later product, to be set to zero.
        `read` [segments] int64 gains how many rows were read, those that turned out to be dropped among them.
        """
        lengths = (weight_rows.shape[1],) if segments is None else segments
        cut = self._cut(lengths, x.numel(), meets=out.dtype != torch.int64 and epilogue != Epilogue.ATOMIC_ADD)
        args = ColumnsArgs(
            weight=native.address(weight_rows),
            x=native.address(x),
            up=native.address(up),
            norm=native.address(norm.weight) if norm else None,
            squares=native.address(squares),
            score=native.address(score),
            threshold=native.address(threshold),
            index=native.address(index),
            count=native.address(count),
            bias=native.address(bias),
            fill=native.address(fill),
            out=native.address(out),
            partial=native.address(self._partial),
            arrived=native.address(self._arrived),
            zero=native.address(zero),
            read=native.address(read),
            stride=weight_rows.stride(0),
            epsilon=norm.epsilon if norm else 0.0,
            inputs=x.numel(),
            outputs=weight_rows.shape[1],
            slices=cut.slices,
            segments=len(lengths),
            activation=ACTIVATIONS[activation],
            epilogue=FIXED_ADD if out.dtype == torch.int64 else epilogue,
            squares_count=0 if squares is None else squares.numel(),
            scale=scale,
            ahead=0 if fresh else self._tuning.ahead,
            later=0 if fresh else self._tuning.later,
            fresh=int(fresh),
            invert=int(invert),
            keeps_nan=int(keeps_nan),
            fixed=int(x.dtype == torch.int64),
            zeros=0 if zero is None else zero.numel(),
            segment=segments_of(lengths, cut.groups),
        )
        selects = threshold is not None or skip_zeros
        self._library.columns(
            args,
            weight_rows.dtype,
            int(selects),
            groups=cut.groups,
            tiles=cut.tiles,
            dependent=self._starts_early(),
        )

    def _cut(self, segments: tuple[int, ...], inputs: int, *, meets: bool) -> Cut:
        """How a product is cut into blocks that fill the chip, in wide tiles if it can be; slices that meet are few."""
        blocks = self._sms * self._tuning.columns_blocks_per_sm
        most = min(self._tuning.max_slices if meets else blocks, max(1, inputs // 32))

        def tiles(groups: int) -> int:
            return sum(math.ceil(length / (TILE * groups)) for length in segments)

        wide = tiles(2) * 2 <= 1.1 * tiles(1) and tiles(2) * most >= 0.8 * blocks
        groups = 2 if wide else 1
        return Cut(groups=groups, tiles=tiles(groups), slices=max(1, min(blocks // tiles(groups), most)))


def segments_of(lengths: tuple[int, ...], groups: int) -> "ctypes.Array[Segment]":
    """Neighbouring segments of outputs, each in tiles of its own."""
    tiles = [math.ceil(length / (TILE * groups)) for length in lengths]
    found = (Segment(sum(lengths[:i]), lengths[i], sum(tiles[:i])) for i in range(len(lengths)))
    return (Segment * 3)(*found)
