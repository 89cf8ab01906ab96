"""Small statistics of one sample."""

import torch
from jaxtyping import Float
from torch import Tensor


def gini(values: Float[Tensor, " n"]) -> float:
    """The Gini coefficient of non-negative values: 0 when all are equal, near 1 when one has everything."""
    ordered = values.double().sort().values
    total = float(ordered.sum())
    if total <= 0 or len(ordered) == 0:
        return 0.0
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    return float((2 * rank - len(ordered) - 1) @ ordered) / (len(ordered) * total)
