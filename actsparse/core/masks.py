"""Choosing the largest: exact counts of kept units, thresholds by row, masks."""

from math import floor

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kept_count(density: float, width: int) -> int:
    """k = max(1, floor(r * f + 0.5)), the units kept of `width` at density r (methods.md, section 0)."""
    return min(width, max(1, floor(density * width + 0.5)))


def top_mask(scores: Float[Tensor, "*rows width"], k: int) -> Bool[Tensor, "*rows width"]:
    """Exactly the k largest of each row; among equals the lower index (the sort is stable)."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def row_threshold(scores: Float[Tensor, "rows width"], k: int) -> Float[Tensor, "rows 1"]:
    """The k-th largest of each row: `scores >= row_threshold` keeps k, and more only among equals."""
    width = scores.shape[-1]
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        import numpy as np

        # numpy's partition is ten times faster here than torch.kthvalue
        return torch.from_numpy(np.partition(scores.numpy(), width - k, axis=-1)[:, width - k].copy())[:, None]
    return scores.kthvalue(width - k + 1, dim=-1, keepdim=True).values
