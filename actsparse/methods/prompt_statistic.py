"""The statistic of a prompt that TDA and GRIFFIN share (methods.md, section 3; GRIFFIN, arXiv 2404.01365).

    s_j = sqrt( sum_t (a_tj / ||a_t||)^2 / P_eff )      rows with ||a_t|| = 0 are skipped; P_eff = rows used

Dividing by P_eff is ours: without it s grows with the length of the prompt.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class PromptStatistic:
    """s of the prompt tokens added so far; float32 within a call, float64 across calls."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._rows = 0

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        squares = rows.float().square()
        norms = squares.sum(dim=1)
        inverse = torch.where(norms > 0, 1.0 / norms, torch.zeros_like(norms))
        total = (inverse @ squares).double()
        self._squares = total if self._squares is None else self._squares + total
        self._rows += int((norms > 0).sum())

    def value(self) -> Float[Tensor, " neurons"]:
        """s [neurons], in float64; all zero when no row had a norm. Raises ValueError before the first token."""
        if self._squares is None:
            raise ValueError("the prompt has no token after the sink tokens")
        return (self._squares / max(1, self._rows)).sqrt()
