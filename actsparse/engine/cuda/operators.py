"""The compiled operators on tensors: each fills buffers that already exist, so that a CUDA graph can replay it.

Vectors are float32 and contiguous, one token's activations, or int64: sums in fixed point (`sums.py`). Matrices are
bfloat16 or float16.
"""

import math

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.cuda.choices import Choices
from actsparse.engine.cuda.column_products import ColumnProducts
from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.row_products import RowProducts
from actsparse.engine.cuda.structures import AttendArgs, FixArgs, GatherArgs, PostNormArgs, TokenArgs
from actsparse.engine.step.reference import Attention
from actsparse.engine.step.state import Angles, Best

LOG2_E = math.log2(math.e)


class Operators(RowProducts, ColumnProducts, Choices):
    """All kernels: products, and what is between them."""

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
        padding: Tensor | None = None,
    ) -> None:
        """out [batch, heads * head_dim] = attention over the live cache and the token of `qkv`, which the cache gains.

        qkv: [batch, (heads + 2 * kv_heads) * head_dim], floats or sums in fixed point; position: [1] int32;
        keys, values: [batch, kv_heads, positions, head_dim]; padding [batch] int64: positions before a sequence's first
        token, which it does not see and which do not count for its rotation;
        groups [kv_heads] int32: 0 for groups whose heads return zeros and whose cache is written but not read.
        """
        batch, kv_heads, positions, head_dim = keys.shape
        heads = out.numel() // (batch * head_dim)
        splits = 1
        crowded = batch > 1 and batch * heads <= self._sms < 2 * batch * heads  # nearly a head a multiprocessor
        most = self._sms * (2 if crowded else 1)  # blocks; two share a multiprocessor
        while splits < 8 and head_dim % (splits * 2) == 0 and batch * heads * splits * 2 <= most:
            splits *= 2
        args = AttendArgs(
            qkv=native.address(qkv),
            cosine=native.address(angles.cosine),
            sine=native.address(angles.sine),
            keys=native.address(keys),
            values=native.address(values),
            position=native.address(position),
            padding=native.address(padding),
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
            batch=batch,
            fixed=int(qkv.dtype == torch.int64),
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

        hidden: [batch, width]; best: [batch, candidates]; forced, tokens: [batch, positions]; squares[:batch] become
        the sums of hidden * hidden.
        """
        args = TokenArgs(
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
            candidates=best.value.shape[1],
            positions=tokens.shape[1],
            width=hidden.shape[1],
            batch=len(hidden),
        )
        self._library.token(args, embedding.dtype, dependent=self._starts_early())

    def post_norm(self, hidden: Tensor, branch: Tensor, norm: Norm, *, squares: Tensor, scale: float = 1.0) -> None:
        """hidden += scale * norm(branch), both [batch, width]; squares[:batch] become the sums of hidden * hidden.

        A branch of sums in fixed point becomes zero, so that the next can be added up there.
        """
        args = PostNormArgs(
            branch=native.address(branch),
            weight=native.address(norm.weight),
            hidden=native.address(hidden),
            squares=native.address(squares),
            epsilon=norm.epsilon,
            scale=scale,
            width=hidden.shape[-1],
            fixed=int(branch.dtype == torch.int64),
        )
        batch = hidden.numel() // hidden.shape[-1]
        self._library.post_norm(args, batch=batch, dependent=self._starts_early())

    def fix(self, sums: Tensor, values: Tensor) -> None:
        """sums [any], in fixed point, become values [any]."""
        args = FixArgs(values=native.address(values), sums=native.address(sums), size=sums.numel())
        self._library.fix(args, dependent=self._starts_early())

    def gather(self, target: Tensor, source: Tensor, index: Tensor, count: Tensor) -> None:
        """target [layers, parts, capacity, width] = the rows of source [layers, parts, rows, width] at `index`.

        index: [layers, capacity]; rows from `count` [layers] on become zero.
        """
        layers, parts, capacity, width = target.shape
        args = GatherArgs(
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
