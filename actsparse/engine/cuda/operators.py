"""The compiled operators on tensors: each fills buffers that already exist, so that a CUDA graph can replay it.

Vectors are float32 and contiguous, one token's activations; matrices are bfloat16 or float16.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.step.reference import Attention
from actsparse.engine.step.state import Angles, Best

LOG2_E = math.log2(math.e)
PARTIAL, TILES = 2**21, 2**14
TILE = 256  # outputs that a block of the input-major kernel owns
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "identity": 3, "gelu": 4}


class RowsMode(IntEnum):
    """What a product with output rows does with its results; mirrors kernels/rows.cu."""

    STORE = 0
    RESIDUAL = 1
    GATED = 2
    THRESHOLD = 3
    KEPT = 4
    BEST = 5


class Epilogue(IntEnum):
    """What a product with input rows does with its results; mirrors kernels/columns.cu."""

    WRITE = 0
    ADD = 1
    ATOMIC_ADD = 2


class Norm(NamedTuple):
    """RMSNorm applied to a product's input: weight [width], float32."""

    weight: Tensor
    epsilon: float


class Caps(NamedTuple):
    """What logits are multiplied by, and what they are soft-capped at (0: not)."""

    scale: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Launch shapes. Blocks that leave room beside them let the next kernel's blocks start and fill their rings early.

    `ahead`: pairs of rows that a warp of a sparse product, which has 4 under way, starts to read before it knows which
    are kept.
    `rows_deep`: longer rings in the dense products.
    """

    rows_threads: int = 512
    rows_blocks_per_sm: int = 2
    rows_deep: bool = False
    columns_blocks_per_sm: int = 2
    ahead: int = 0
    max_slices: int = 16


class Cut(NamedTuple):
    """Blocks of the input-major kernel: tiles of 256 * groups outputs, each in slices of the inputs."""

    groups: int
    tiles: int
    slices: int


class Operators:
    """The kernels with their launch shapes for one device; `blocks` is how many candidates `head` leaves."""

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self._library = native.library()
        self._tuning = tuning or Tuning()
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.blocks = self._sms * self._tuning.rows_blocks_per_sm
        self._chained = False
        self._dependent = False
        # Where slices of a product meet: room for every block's tile, and how many of a tile's blocks have arrived.
        self._partial = torch.zeros(PARTIAL, device=device)
        self._arrived = torch.zeros(TILES, dtype=torch.int32, device=device)

    @contextmanager
    def chain(self) -> Iterator[None]:
        """Launches inside start while their predecessor ends and read weights and cache before waiting for it.

        The first waits for all work before it. Nothing else may launch inside, and no kernel inside may change the
        weights, the position or the cache below it before the last one.
        """
        self._chained, self._dependent = True, False
        try:
            yield
        finally:
            self._chained = self._dependent = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Other work on the device inside a chain: it waits for what came before, and the next kernel waits for it."""
        yield
        self._dependent = False

    def _starts_early(self) -> bool:
        early, self._dependent = self._dependent, self._chained
        return early

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
    ) -> None:
        args = native.RowsArgs(
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
        index: Tensor | None = None,
        count: Tensor | None = None,
        fresh: bool = False,
    ) -> None:
        """out [neurons] = act(gate x) * (up x) - fill; gate_up [2 * neurons, width], gate rows first, bias likewise.

        With `index` [capacity], out_i is neuron index_i; with `count` [1], only the first `count` are read and written;
        `fresh` where this step made them.
        """
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
        self._rows(RowsMode.THRESHOLD, out, x, weight, norm=norm, threshold=threshold, activation=activation, bias=bias)

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
    ) -> None:
        """out [rows] = factor * act(weight x + bias) - fill where factor [rows] is not 0, else 0.

        Other rows are not read.
        """
        self._rows(RowsMode.KEPT, out, x, weight, norm=norm, factor=factor, activation=activation, bias=bias, fill=fill)

    def head(
        self, logits: Tensor, best: Best, x: Tensor, weight: Tensor, *, norm: Norm, caps: Caps | None = None
    ) -> None:
        """logits [vocab] = weight times norm(x), scaled and capped, and every block's largest of them in `best`."""
        scale, cap = caps or Caps()
        self._rows(RowsMode.BEST, logits, x, weight, norm=norm, best=best, scale=scale, cap=cap)

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
        squares_out: Tensor | None = None,
        bias: Tensor | None = None,
        fill: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        fresh: bool = False,
        invert: bool = False,
        scale: float = 1.0,
    ) -> None:
        """out [outputs] = scale * sum of x_i * weight_rows[i] over the inputs kept; weight_rows [inputs, outputs].

        Without `threshold` and `skip_zeros` every input is read. `threshold` [segments] applies per segment of outputs
        (`segments` are their lengths), to |x_i| times `score` [segments, inputs] where given. `up`: x_i stands for
        act(x_i) * up_i. `index` [inputs]: the row of x_i; `count` [1]: live inputs; `fresh` where this step made them.
        fill [inputs] is taken off the values that are kept; `invert` keeps what is below the threshold.
        ATOMIC_ADD adds in no fixed order. What is read before it is known to be kept is passed over later.
        `squares` [any]: parts of the sum of x_i * x_i, which spare the norm from reading all of x in every block;
        `squares_out` [square_parts]: such parts of the output.
        """
        lengths = (weight_rows.shape[1],) if segments is None else segments
        cut = self._cut(lengths, x.numel())
        tiles = [math.ceil(length / (TILE * cut.groups)) for length in lengths]
        parts = (native.Segment * 3)(
            *(native.Segment(sum(lengths[:i]), lengths[i], sum(tiles[:i])) for i in range(len(lengths)))
        )
        args = native.ColumnsArgs(
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
            squares_out=native.address(squares_out),
            stride=weight_rows.stride(0),
            epsilon=norm.epsilon if norm else 0.0,
            inputs=x.numel(),
            outputs=weight_rows.shape[1],
            slices=cut.slices,
            segments=len(lengths),
            activation=ACTIVATIONS[activation],
            epilogue=epilogue,
            squares_count=0 if squares is None else squares.numel(),
            scale=scale,
            ahead=0 if fresh else self._tuning.ahead,
            fresh=int(fresh),
            invert=int(invert),
            segment=parts,
        )
        selects = threshold is not None or skip_zeros
        self._library.columns(
            args,
            weight_rows.dtype,
            int(selects),
            groups=cut.groups,
            tiles=sum(tiles),
            dependent=self._starts_early(),
        )

    def _cut(self, segments: tuple[int, ...], inputs: int) -> "Cut":
        """How a product is cut into blocks that fill the chip: wide tiles where there are enough of them."""
        blocks = self._sms * self._tuning.columns_blocks_per_sm

        def tiles(groups: int) -> int:
            return sum(math.ceil(length / (TILE * groups)) for length in segments)

        wastes = tiles(2) * 2 > 1.1 * tiles(1)
        groups = 1 if wastes or tiles(2) * self._tuning.max_slices < 0.8 * blocks else 2
        slices = max(1, min(blocks // tiles(groups), self._tuning.max_slices, inputs // 32))
        return Cut(groups=groups, tiles=tiles(groups), slices=slices)

    def square_parts(self, outputs: int, inputs: int) -> int:
        """How many parts `columns` leaves in `squares_out` for one segment of `outputs`."""
        cut = self._cut((outputs,), inputs)
        return cut.tiles * cut.groups * TILE // 32

    def attend(
        self,
        out: Tensor,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        position: Tensor,
        angles: Angles,
        how: Attention,
        groups: Tensor | None = None,
    ) -> None:
        """out [heads * head_dim] = attention over the live cache and the token of `qkv`, which the cache gains.

        qkv: [(heads + 2 * kv_heads) * head_dim]; keys, values: [kv_heads, positions, head_dim]; position: [1] int32;
        groups [kv_heads] int32: 0 for groups whose heads return zeros and whose cache is written but not read.
        """
        kv_heads, positions, head_dim = keys.shape
        heads = out.numel() // head_dim
        splits = 1
        while splits < 8 and head_dim % (splits * 2) == 0 and heads * splits * 2 <= self._sms:
            splits *= 2
        args = native.AttendArgs(
            qkv=native.address(qkv),
            cosine=native.address(angles.cosine),
            sine=native.address(angles.sine),
            keys=native.address(keys),
            values=native.address(values),
            position=native.address(position),
            out=native.address(out),
            q_norm=native.address(how.q_norm),
            k_norm=native.address(how.k_norm),
            groups=native.address(groups),
            scale=how.scale * (1.0 if how.softcap else LOG2_E),
            cap=(how.softcap or 0.0) * LOG2_E,
            inverse_cap=1 / how.softcap if how.softcap else 0.0,
            epsilon=how.epsilon,
            half=angles.cosine.shape[1],
            window=how.window or 0,
            heads=heads,
            kv_heads=kv_heads,
            positions=positions,
            splits=splits,
        )
        self._library.attend(args, keys.dtype, head_dim, dependent=self._starts_early())

    def token(
        self,
        hidden: Tensor,
        best: Best,
        embedding: Tensor,
        *,
        squares: Tensor,
        forced: Tensor,
        tokens: Tensor,
        position: Tensor,
        embed_scale: float = 1.0,
    ) -> None:
        """Writes the next token (the forced one, if any), its scaled embedding into `hidden`, and advances `position`.

        squares[0] becomes the sum of hidden * hidden.
        """
        args = native.TokenArgs(
            best_value=native.address(best.value),
            best_row=native.address(best.row),
            forced=native.address(forced),
            tokens=native.address(tokens),
            position=native.address(position),
            embedding=native.address(embedding),
            hidden=native.address(hidden),
            squares=native.address(squares),
            stride=embedding.stride(0),
            embed_scale=embed_scale,
            candidates=best.value.numel(),
            positions=tokens.numel(),
            width=hidden.numel(),
        )
        self._library.token(args, embedding.dtype, dependent=self._starts_early())

    def post_norm(self, hidden: Tensor, branch: Tensor, norm: Norm, *, squares: Tensor, scale: float = 1.0) -> None:
        """hidden [width] += scale * norm(branch) [width]; squares[0] becomes the sum of hidden * hidden."""
        args = native.PostNormArgs(
            branch=native.address(branch),
            weight=native.address(norm.weight),
            hidden=native.address(hidden),
            squares=native.address(squares),
            epsilon=norm.epsilon,
            scale=scale,
            width=hidden.numel(),
        )
        self._library.post_norm(args, dependent=self._starts_early())

    def gather(self, target: Tensor, source: Tensor, index: Tensor, count: Tensor) -> None:
        """target [layers, parts, capacity, width] = the rows of source [layers, parts, rows, width] at `index`.

        index: [layers, capacity]; rows from `count` [layers] on become zero.
        """
        layers, parts, capacity, width = target.shape
        args = native.GatherArgs(
            source=native.address(source),
            target=native.address(target),
            index=native.address(index),
            count=native.address(count),
            rows=source.shape[2],
            capacity=capacity,
            parts=parts,
            quads=width * source.element_size() // 16,
        )
        self._library.gather(args, layers)
