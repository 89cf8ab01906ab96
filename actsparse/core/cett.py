"""CETT, the cumulative error of tail truncation (methods.md, section 2; Luo et al., *Sparsing Law*, and
arXiv 2402.03804).

    D(x, eps)    = { i : |a_i| * ||w_i|| < eps }
    CETT(x, eps) = || sum_{i in D} a_i w_i || / || W_d a ||
    sparsity     = |D| / f
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.core.quantiles import rank
from actsparse.core.stats import mean_stderr
from actsparse.core.tail_norms import Tail, chunks

SOLVE_STEPS = 30
# A threshold is known when its bracket is narrower than this share of it.
TOLERANCE = 1e-5
# A threshold stands so far under the bracket, as a share of it, that no rounding puts the next neuron below it.
ROUNDING = 1e-6
# How far beside a first guess, as a share of it, the solution is looked for.
MARGIN = 0.06
CURVE_TOKENS = 1024
CURVE_SHARES = (0.01, *(round(0.03 * i, 2) for i in range(1, 31)), 0.95, 0.98)


@dataclass(frozen=True, slots=True, kw_only=True)
class CettPoint:
    """A threshold with its mean CETT over tokens and its sparsity (share of neurons dropped).

    Standard errors are over sequences where these are known, else over tokens; None where they cannot be told.
    """

    eps: float
    cett: float
    sparsity: float
    tokens: int
    cett_stderr: float | None
    sparsity_stderr: float | None


@dataclass(frozen=True)
class CettLayer:
    """The neuron activations of one layer, ready for CETT at any threshold.

    Tokens whose output is zero or not finite are left out; `output_norms` [tokens] are those of the others, and
    `sequences` [tokens] say which of them stand in one text (None: not known).
    """

    tail: Tail
    output_norms: Float[Tensor, " tokens"]
    sequences: Int[Tensor, " tokens"] | None = None

    @classmethod
    def of(
        cls,
        a: Float[Tensor, "tokens neurons"],
        down: Float[Tensor, "hidden neurons"],
        sequences: Int[Tensor, " tokens"] | None = None,
    ) -> "CettLayer":
        """Prepare activations; in float32."""
        a, rows = a.float(), down.float().t().contiguous()
        outputs = torch.cat([(part @ rows).norm(dim=1) for part in chunks(a)]) if len(a) else a.new_zeros(0)
        used = (outputs > 0) & outputs.isfinite() & a.isfinite().all(dim=1)
        if not used.all():
            a, outputs = a[used], outputs[used]
            sequences = None if sequences is None else sequences[used.cpu()]
        return cls(Tail(a.contiguous(), rows, rows.norm(dim=1)), outputs, sequences)

    @property
    def tokens(self) -> int:
        return len(self.tail.a)

    def head(self, tokens: int) -> "CettLayer":
        """The first `tokens` tokens only."""
        sequences = None if self.sequences is None else self.sequences[:tokens]
        return CettLayer(self.tail.head(tokens), self.output_norms[:tokens], sequences)

    def largest_score(self) -> float:
        """The largest |a|*||w||."""
        return float((self.tail.a.abs().amax(dim=0) * self.tail.norms).max()) if self.tokens else 0.0

    def at(self, eps: float) -> CettPoint:
        """CETT and sparsity at one threshold."""
        return self.points((eps,))[0]

    def points(self, thresholds: Iterable[float]) -> list[CettPoint]:
        """CETT and sparsity at ascending thresholds."""
        asked = tuple(thresholds)
        found = self.tail.dropped(asked)
        return [self.point(*one) for one in zip(asked, found.norms, found.shares, strict=True)]

    def point(self, eps: float, norms: Float[Tensor, " tokens"], shares: Float[Tensor, " tokens"]) -> CettPoint:
        """The means over tokens, from norm and share of what `eps` drops."""
        ratio, share = (norms / self.output_norms).double(), shares.double()
        return CettPoint(
            eps=eps,
            cett=float(ratio.mean()),
            sparsity=float(share.mean()),
            tokens=len(ratio),
            cett_stderr=mean_stderr(ratio.cpu(), self.sequences),
            sparsity_stderr=mean_stderr(share.cpu(), self.sequences),
        )

    def rho(self) -> float:
        """Mean over tokens of sum_i ||n_i||^2 / ||W_d a||^2: over 1 where neurons cancel, under 1 where they add up."""
        squares = torch.cat([part.square() @ self.tail.norms.square() for part in chunks(self.tail.a)])
        return float((squares.double() / self.output_norms.double().square()).mean())

    def sweep(self, shares: tuple[float, ...]) -> list[CettPoint]:
        """CETT at the thresholds that drop the given shares of all entries."""
        flat = (self.tail.a.abs() * self.tail.norms).flatten()
        places = [min(len(flat) - 1, rank(share, len(flat))) for share in shares]
        if flat.device.type == "cpu":
            ordered = np.partition(flat.numpy(), places)[places]
            return self.points(float(eps) for eps in ordered)
        return self.points(flat.sort().values[places].tolist())

    def solve(self, target: float, bracket: tuple[float, float] | None = None) -> CettPoint:
        """The largest threshold found whose mean CETT is at most `target`.

        The root that bisection finds from [0, largest score], or from a `bracket`, which is moved until it holds it.
        It is narrowed around the secant through its ends until it is narrower than `TOLERANCE` of its value.
        """
        if bracket is None and self.tokens > CURVE_TOKENS:
            guess = self.head(CURVE_TOKENS).solve(target).eps
            bracket = _around(guess)
        search = _Search(self, target, bracket)
        search.narrow()
        return search.solution()


class _Search:
    """A bracket of the threshold at which a layer's mean CETT reaches a target: `low` is at most the target, `high`
    over it (or the largest score)."""

    def __init__(self, layer: CettLayer, target: float, bracket: tuple[float, float] | None) -> None:
        self._layer = layer
        self._target = target
        self._top = layer.largest_score()
        low, high = bracket or (0.0, self._top)
        self._open(low, min(high, self._top))
        while self._below > target and low > 0:
            low, high = (low / 2 if low > 1e-6 * self._top else 0.0), low
            self._open(low, high)
        while self._above <= target and high < self._top:
            low, high = high, min(2 * high, self._top)
            self._open(low, high)

    def _open(self, low: float, high: float) -> None:
        """Start from this bracket, whether or not it holds the root."""
        below = low * (1 - ROUNDING)
        self._start = (below, self._layer.tail.below(below))
        self.low, self.high = low, high
        self._below, self._above = (point.cett for point in self._points((low, high)))

    def narrow(self) -> None:
        """Narrow the bracket; where the target lies above all CETT the threshold is the largest score."""
        if self._above <= self._target:
            self.low = self.high
        for step in range(SOLVE_STEPS):
            if self.high - self.low <= TOLERANCE * self.high:
                return
            for point in self._points(self._inside(step)):
                if point.cett > self._target:
                    self.high, self._above = point.eps, point.cett
                    break
                self.low, self._below = point.eps, point.cett

    def solution(self) -> CettPoint:
        """CETT and sparsity just under the bracket."""
        return self._points((self.low * (1 - ROUNDING),))[0]

    def _inside(self, step: int) -> tuple[float, ...]:
        """Ascending thresholds within the bracket, close around the secant's root: many where they cost little."""
        width = self.high - self.low
        weight = (self._target - self._below) / (self._above - self._below)
        root, least = self.low + weight * width, 0.45 * TOLERANCE * self.high
        if self._layer.tail.walked:
            offsets = tuple(least * 10**power for power in range(4))
            middle = ((self.low + root) / 2, (root + self.high) / 2)
        else:
            offsets = (max(least, width**2 / (4 * self.high)),)
            middle = ((self.low + self.high) / 2,) if step % 3 == 2 else ()
        near = {root + side * offset for offset in offsets for side in (-1, 1)}
        inside = sorted(eps for eps in (*near, *middle) if self.low < eps < self.high)
        return tuple(inside) or ((self.low + self.high) / 2,)

    def _points(self, thresholds: tuple[float, ...]) -> list[CettPoint]:
        found = self._layer.tail.dropped(thresholds, self._start)
        return [self._layer.point(*one) for one in zip(thresholds, found.norms, found.shares, strict=True)]


def _around(guess: float) -> tuple[float, float]:
    return guess * (1 - MARGIN), guess * (1 + MARGIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class CettSolution:
    """CETT of one layer: `targets` solved exactly over all tokens, `curve` swept over the first CURVE_TOKENS."""

    targets: dict[float, CettPoint]
    curve: tuple[CettPoint, ...]
    rho: float | None
    tokens: int

    @classmethod
    def of(cls, layer: CettLayer, targets: tuple[float, ...]) -> "CettSolution":
        """Sweep the curve, then solve every target from the bracket that the curve gives."""
        if layer.tokens == 0:
            return cls(targets={}, curve=(), rho=None, tokens=0)
        curve = layer.head(CURVE_TOKENS).sweep(CURVE_SHARES)
        solved = {target: layer.solve(target, _guess(curve, target)) for target in targets}
        return cls(targets=solved, curve=tuple(curve), rho=layer.rho(), tokens=layer.tokens)


def _guess(curve: list[CettPoint], target: float) -> tuple[float, float] | None:
    """A bracket around where the curve crosses the target; None where it does not."""
    for below, above in pairwise(curve):
        if below.cett <= target < above.cett:
            weight = (target - below.cett) / (above.cett - below.cett)
            return _around(below.eps + weight * (above.eps - below.eps))
    return None
