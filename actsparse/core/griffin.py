"""GRIFFIN's statistic over some rows of activations (arXiv 2404.01365; methods.md, section 3).

    s_j = sqrt( sum_t (a_tj / ||a_t||)^2 / P_eff )      rows that are zero or not finite are skipped; P_eff = rows used

Dividing by P_eff is ours: without it s grows with the length of the prompt. `core.row_sums` keeps the same sum over a
whole profile, where entries that are not finite count as zeros.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def share_squares(rows: Float[Tensor, "tokens neurons"]) -> tuple[Float[Tensor, " neurons"], int]:
    """sum_t (a_tj / ||a_t||)^2 in float64, and how many rows it was taken over; sums of parts add up.

    Within a call in float32, float64 rows in float64.
    """
    values = rows if rows.dtype == torch.float64 else rows.float()
    squares = values.square()
    norms = squares.sum(dim=1)
    used = (norms > 0) & norms.isfinite()
    count = int(used.sum())
    if count < len(rows):
        squares, norms = squares[used], norms[used]
    return ((1.0 / norms) @ squares).double(), count
