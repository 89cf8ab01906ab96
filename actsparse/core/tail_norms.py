"""Norms of the dropped part of an FFN's output at many thresholds: what CETT is made of.

On a CPU a C++ kernel (`kernels/tail_norms.cpp`) walks over each token's neurons once, in order of size; elsewhere every
threshold takes one product in torch.
"""

from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.native import in_parts, library

CHUNK_ENTRIES = 1 << 23


@dataclass(frozen=True)
class Dropped:
    """What thresholds drop: the norm of its output, and its share of the neurons, [thresholds, tokens] each."""

    norms: Float[Tensor, "thresholds tokens"]
    shares: Float[Tensor, "thresholds tokens"]


@dataclass(frozen=True)
class Tail:
    """Activations whose smaller part is summed up: a [tokens, neurons], down_rows [neurons, hidden], norms [neurons].

    All float32 and contiguous, on one device.
    """

    a: Float[Tensor, "tokens neurons"]
    down_rows: Float[Tensor, "neurons hidden"]
    norms: Float[Tensor, " neurons"]

    def head(self, tokens: int) -> "Tail":
        """The first `tokens` tokens only."""
        return Tail(self.a[:tokens], self.down_rows, self.norms)

    @property
    def walked(self) -> bool:
        """Whether many thresholds cost little more than one."""
        return self.a.device.type == "cpu" and library("tail_norms.cpp") is not None

    def below(self, eps: float) -> Float[Tensor, "tokens hidden"]:
        """sum of a_i w_i over the neurons with |a_i| * ||w_i|| < eps."""
        if eps <= 0:
            return self.a.new_zeros(len(self.a), self.down_rows.shape[1])
        return torch.cat([torch.where(self._small(part, eps), part, 0.0) @ self.down_rows for part in chunks(self.a)])

    def dropped(
        self,
        thresholds: Sequence[float],
        start: tuple[float, Float[Tensor, "tokens hidden"]] | None = None,
    ) -> Dropped:
        """The neurons with |a_i| * ||w_i|| < eps, for ascending thresholds.

        `start`: a threshold that is not over any of them, and `below` of it, so that only what lies above it is summed.
        """
        if not self.walked:
            shares = [torch.cat([self._small(part, eps).float().mean(dim=1) for part in chunks(self.a)])
                      for eps in thresholds]  # fmt: skip
            return Dropped(torch.stack([self.below(eps).norm(dim=1) for eps in thresholds]), torch.stack(shares))
        call = library("tail_norms.cpp")
        assert call is not None
        low, sums = (0.0, None) if start is None else start
        steps = torch.tensor(thresholds, dtype=torch.float32)
        norms = torch.zeros(len(steps), len(self.a))
        counts = torch.zeros(len(steps), len(self.a), dtype=torch.int32)

        def part(span: slice) -> None:
            begin = None if sums is None else c_void_p(sums[span].data_ptr())
            call.actsparse_tail_norms(
                c_void_p(self.a[span].data_ptr()), c_void_p(self.norms.data_ptr()),
                c_void_p(self.down_rows.data_ptr()), begin, c_int64(span.stop - span.start),
                c_int64(self.a.shape[1]), c_int64(self.down_rows.shape[1]), c_float(low),
                c_void_p(steps.data_ptr()), c_int64(len(steps)), c_void_p(norms[:, span.start :].data_ptr()),
                c_void_p(counts[:, span.start :].data_ptr()), c_int64(norms.stride(0)),
            )  # fmt: skip

        in_parts(len(self.a), self.a.shape[1] * self.down_rows.shape[1], part)
        return Dropped(norms, counts.float() / self.a.shape[1])

    def _small(self, a: Float[Tensor, "tokens neurons"], eps: float) -> Tensor:
        return a.abs() * self.norms < eps


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows in pieces of at most CHUNK_ENTRIES entries of a [rows, width] tensor."""
    rows = max(1, CHUNK_ENTRIES // x.shape[-1])
    return x.split(rows) if len(x) else ()
