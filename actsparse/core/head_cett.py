"""CETT with attention heads as units (methods.md, sections 2 and 3): how many heads could be left out at a given error.

n_h          = W_o,h o_h                     the output of head h, a vector
D(x, eps)    = { h : ||n_h|| < eps }
CETT(x, eps) = || sum_{h in D} n_h || / || sum_h n_h ||
sparsity     = |D| / heads
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.cett import SOLVE_STEPS, CettPoint
from actsparse.core.stats import mean_stderr

CHUNK_ENTRIES = 1 << 23


@dataclass(frozen=True)
class HeadCett:
    """The outputs of a layer's heads (or KV groups), ready for CETT at any threshold.

    products [tokens, heads, heads]: inner products <n_h, n_k> in float64, which hold every norm that CETT needs. Tokens
    whose output is zero or not finite are left out.
    """

    products: Float[Tensor, "tokens heads heads"]

    @classmethod
    def of(cls, o: Float[Tensor, "tokens width"], weight: Float[Tensor, "hidden width"], heads: int) -> "HeadCett":
        """From concatenated head outputs and the output projection; `heads` equal slices of the width."""
        slices = weight.float().view(weight.shape[0], heads, -1)
        rows = max(1, CHUNK_ENTRIES // weight.shape[0] // heads)
        found = [_products(part, slices) for part in o.float().split(rows)]
        products = torch.cat(found) if found else torch.zeros(0, heads, heads, dtype=torch.float64)
        total = products.sum(dim=(1, 2))
        return cls(products[(total > 0) & total.isfinite()])

    @property
    def tokens(self) -> int:
        return len(self.products)

    @property
    def norms(self) -> Float[Tensor, "tokens heads"]:
        """||n_h|| of every head."""
        return self.products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    def at(self, eps: float) -> CettPoint:
        """CETT and sparsity at one threshold."""
        dropped = (self.norms < eps).double()
        left_out = torch.einsum("th,thk,tk->t", dropped, self.products, dropped).clamp_min(0).sqrt()
        ratio, share = left_out / self.products.sum(dim=(1, 2)).sqrt(), dropped.mean(dim=1)
        return CettPoint(
            eps=eps,
            cett=float(ratio.mean()),
            sparsity=float(share.mean()),
            tokens=self.tokens,
            cett_stderr=mean_stderr(ratio),
            sparsity_stderr=mean_stderr(share),
        )

    def solve(self, target: float) -> CettPoint:
        """The largest threshold found by bisection whose mean CETT is at most `target`."""
        low, high = 0.0, float(self.norms.max()) if self.tokens else 0.0
        for _ in range(SOLVE_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle).cett <= target else (low, middle)
        return self.at(low)


def _products(o: Float[Tensor, "tokens width"], slices: Float[Tensor, "hidden heads part"]) -> Tensor:
    outputs = torch.einsum("thi,dhi->thd", o.view(len(o), slices.shape[1], -1), slices).double()
    return outputs @ outputs.transpose(1, 2)
