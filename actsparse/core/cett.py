"""CETT, the cumulative error of tail truncation (methods.md, section 2; Luo et al., *Sparsing Law*, and
arXiv 2402.03804).

    D(x, eps)    = { i : |a_i| * ||w_i|| < eps }
    CETT(x, eps) = || sum_{i in D} a_i w_i || / || W_d a ||
    sparsity     = |D| / f
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.quantiles import rank

CHUNK_ENTRIES = 1 << 23
SOLVE_STEPS = 30
CURVE_TOKENS = 1024
CURVE_SHARES = (0.01, *(round(0.03 * i, 2) for i in range(1, 31)), 0.95, 0.98)


@dataclass(frozen=True, slots=True, kw_only=True)
class CettPoint:
    """A threshold with its mean CETT over tokens (stderr over tokens) and its sparsity (share of neurons dropped)."""

    eps: float
    cett: float
    sparsity: float
    tokens: int
    cett_stderr: float
    sparsity_stderr: float


@dataclass(frozen=True)
class CettLayer:
    """The neuron activations of one layer, ready for CETT at any threshold.

    a: [tokens, neurons]; down: [hidden, neurons]. Tokens whose output is zero or not finite are left out.
    """

    a: Float[Tensor, "tokens neurons"]
    down: Float[Tensor, "hidden neurons"]
    norms: Float[Tensor, " neurons"]
    output_norms: Float[Tensor, " tokens"]

    @classmethod
    def of(cls, a: Float[Tensor, "tokens neurons"], down: Float[Tensor, "hidden neurons"]) -> "CettLayer":
        """Prepare activations; in float32."""
        a, down = a.float(), down.float()
        outputs = torch.cat([(part @ down.T).norm(dim=1) for part in _chunks(a)]) if len(a) else a.new_zeros(0)
        used = (outputs > 0) & outputs.isfinite() & a.isfinite().all(dim=1)
        return cls(a[used], down, down.norm(dim=0), outputs[used])

    @property
    def tokens(self) -> int:
        return len(self.a)

    def head(self, tokens: int) -> "CettLayer":
        """The first `tokens` tokens only."""
        return CettLayer(self.a[:tokens], self.down, self.norms, self.output_norms[:tokens])

    def largest_score(self) -> float:
        """The largest |a|*||w||."""
        return float((self.a.abs().amax(dim=0) * self.norms).max()) if self.tokens else 0.0

    def at(self, eps: float) -> CettPoint:
        """CETT and sparsity at one threshold."""
        ratios, dropped = [], []
        for part, outputs in zip(_chunks(self.a), _chunks(self.output_norms, self.a.shape[1]), strict=True):
            small = part.abs() * self.norms < eps
            ratios.append((torch.where(small, part, 0.0) @ self.down.T).norm(dim=1) / outputs)
            dropped.append(small.float().mean(dim=1))
        ratio, share = torch.cat(ratios).double(), torch.cat(dropped).double()
        root = max(1, len(ratio)) ** 0.5
        spread = (float(ratio.std()) / root, float(share.std()) / root) if len(ratio) > 1 else (0.0, 0.0)
        return CettPoint(
            eps=eps,
            cett=float(ratio.mean()),
            sparsity=float(share.mean()),
            tokens=len(ratio),
            cett_stderr=spread[0],
            sparsity_stderr=spread[1],
        )

    def rho(self) -> float:
        """Mean over tokens of sum_i ||n_i||^2 / ||W_d a||^2: over 1 where neurons cancel, under 1 where they add up."""
        squares = torch.cat([(part * self.norms).square().sum(dim=1) for part in _chunks(self.a)])
        return float((squares.double() / self.output_norms.double().square()).mean())

    def sweep(self, shares: tuple[float, ...]) -> list[CettPoint]:
        """CETT at the thresholds that drop the given shares of all entries."""
        flat = (self.a.abs() * self.norms).flatten().sort().values
        return [self.at(float(flat[min(len(flat) - 1, rank(share, len(flat)))])) for share in shares]

    def solve(self, target: float, bracket: tuple[float, float] | None = None) -> CettPoint:
        """The largest threshold found whose mean CETT is at most `target`.

        Bisection as in the definition, from [0, largest score] or a `bracket` that holds the solution, sped up by
        the secant through its ends (Illinois); it ends when the bracket is narrower than 1e-5 of its value.
        """
        low, high = bracket or (0.0, self.largest_score())
        below, above = self.at(low), self.at(high)
        while below.cett > target and low > 0:
            low, above = low / 2, below
            high = above.eps
            below = self.at(low)
        while above.cett <= target and high < self.largest_score():
            low, below = high, above
            high = min(2 * high, self.largest_score())
            above = self.at(high)
        return below if above.cett > target and below.eps == above.eps else self._narrow(below, above, target)

    def _narrow(self, below: CettPoint, above: CettPoint, target: float) -> CettPoint:
        if above.cett <= target:
            return above
        low_error, high_error, side = below.cett - target, above.cett - target, 0
        for step in range(SOLVE_STEPS):
            if above.eps - below.eps <= 1e-5 * above.eps:
                break
            weight = high_error / (high_error - low_error) if low_error and step % 3 < 2 else 0.5
            middle = self.at(above.eps + weight * (below.eps - above.eps))
            if middle.cett <= target:
                below, low_error = middle, middle.cett - target
                high_error = high_error / 2 if side == -1 else high_error
                side = -1
            else:
                above, high_error = middle, middle.cett - target
                low_error = low_error / 2 if side == 1 else low_error
                side = 1
        return below


def _chunks(x: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Rows in pieces of at most CHUNK_ENTRIES entries of a [rows, width] tensor."""
    rows = max(1, CHUNK_ENTRIES // (width or x.shape[-1]))
    return x.split(rows) if len(x) else ()


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
        solved = {target: layer.solve(target, _bracket(curve, target)) for target in targets}
        return cls(targets=solved, curve=tuple(curve), rho=layer.rho(), tokens=layer.tokens)


def _bracket(curve: list[CettPoint], target: float) -> tuple[float, float] | None:
    """Neighbouring thresholds of the curve with the target between them."""
    for below, above in pairwise(curve):
        if below.cett <= target < above.cett:
            return below.eps, above.eps
    return None
