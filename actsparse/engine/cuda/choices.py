"""Choices among units on the device: thresholds of the largest, routers' scores, and the lists of what they keep."""

import ctypes
import math

import torch
from torch import Tensor

from actsparse.engine.cuda import native
from actsparse.engine.cuda.launcher import ACTIVATIONS, Launcher, Norm
from actsparse.engine.cuda.structures import ChooseArgs, MergeArgs, ScoresArgs, TopArgs
from actsparse.engine.step.plans import Selection

SCORE_WARPS = 8  # of a block of `scores`: a row each, or all at one row where rows are wide
SCORE_WIDE = 1024
SCORE_BLOCKS_PER_SM = 4


class Choices(Launcher):
    """The kernels of choices.cu."""

    def top(
        self,
        threshold: Tensor,
        x: Tensor,
        tops: tuple[int, ...],
        *,
        norm: Norm | None = None,
        score: Tensor | None = None,
        up: Tensor | None = None,
        activation: str = "identity",
    ) -> None:
        """threshold [rules]: what the `tops` largest of |x_i| times score [rules, inputs] reach, and no smaller ones.

        Halfway to the next smaller value; what equals the least of the largest reaches it too. Up to three rules; each
        top is at least 1 and less than inputs. norm, `up` and activation as in `columns`; x and `up` may be sums in
        fixed point.
        """
        args = TopArgs(
            x=native.address(x),
            up=native.address(up),
            norm=native.address(norm.weight) if norm else None,
            score=native.address(score),
            threshold=native.address(threshold),
            epsilon=norm.epsilon if norm else 0.0,
            inputs=x.numel(),
            activation=ACTIVATIONS[activation],
            fixed=int(x.dtype == torch.int64),
            rules=len(tops),
            top=(ctypes.c_int * 3)(*tops),
        )
        self._library.top(args, dependent=self._starts_early())

    def scores(self, out: Tensor, x: Tensor, weight: Tensor, *, norm: Norm | None = None, tanh: bool = False) -> None:
        """out [rows] = weight [rows, width] times norm(x) [width], in float32, and its tanh where asked for."""
        args = ScoresArgs(
            weight=native.address(weight),
            x=native.address(x),
            norm=native.address(norm.weight) if norm else None,
            out=native.address(out),
            epsilon=norm.epsilon if norm else 0.0,
            rows=weight.shape[0],
            width=weight.shape[1],
            tanh=int(tanh),
            fixed=int(x.dtype == torch.int64),
        )
        whole = weight.shape[1] >= SCORE_WIDE
        most = weight.shape[0] if whole else math.ceil(weight.shape[0] / SCORE_WARPS)
        blocks = min(most, SCORE_BLOCKS_PER_SM * self._sms)
        self._library.scores(args, blocks=blocks, whole=whole, dependent=self._starts_early())

    def choose(
        self,
        kept: Selection | Tensor,
        score: Tensor,
        top: int,
        *,
        sizes: Tensor | None = None,
        members: Tensor | None = None,
        always: Tensor | None = None,
    ) -> None:
        """The neurons that a router with score [units] keeps, first of equals: as in `step.work.Chosen`.

        They become a list, index [neurons] ascending up to count [1], or a mask [neurons], 1 for what is kept; int32.
        """
        index, count, mask = (None, None, kept) if isinstance(kept, Tensor) else (kept.index, kept.count, None)
        args = ChooseArgs(
            score=native.address(score),
            sizes=native.address(sizes),
            members=native.address(members),
            always=native.address(always),
            index=native.address(index),
            count=native.address(count),
            mask=native.address(mask),
            units=score.numel(),
            each=0 if members is None else members.shape[1],
            top=top,
            neurons=(kept if isinstance(kept, Tensor) else kept.index).numel(),
        )
        self._library.choose(args, dependent=self._starts_early())

    def merge(self, out: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
        """out [any] = act(gate) * up."""
        args = MergeArgs(
            gate=native.address(gate),
            up=native.address(up),
            out=native.address(out),
            activation=ACTIVATIONS[activation],
            size=out.numel(),
        )
        self._library.merge(args, dependent=self._starts_early())
