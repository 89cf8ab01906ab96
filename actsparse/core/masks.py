"""Choosing the largest: exact counts of kept units, thresholds by row, masks."""

from ctypes import c_int64, c_void_p
from math import floor

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.native import in_parts, library

# Passes over a row that the search for its k-th largest takes.
SEARCH_PASSES = 32


def kept_count(density: float, width: int) -> int:
    """k = max(1, floor(r * f + 0.5)), the units kept of `width` at density r (methods.md, section 0)."""
    return min(width, max(1, floor(density * width + 0.5)))


def top_mask(scores: Float[Tensor, "*rows width"], k: int) -> Bool[Tensor, "*rows width"]:
    """Exactly the k largest of each row; among equals the lower index."""
    if natively(scores):
        rows = scores.detach().reshape(-1, scores.shape[-1]).contiguous()
        mask = torch.empty(rows.shape, dtype=torch.bool)
        _search("actsparse_top_masks", rows, k, mask)
        return mask.view(scores.shape)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def row_threshold(scores: Float[Tensor, "rows width"], k: int) -> Float[Tensor, "rows 1"]:
    """The k-th largest of each row: `scores >= row_threshold` keeps k, and more only among equals."""
    width = scores.shape[-1]
    if natively(scores):
        found = torch.empty(len(scores))
        _search("actsparse_kth_largest", scores.detach().contiguous(), k, found)
        return found[:, None]
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        import numpy as np

        # numpy's partition is ten times faster here than torch.kthvalue
        return torch.from_numpy(np.partition(scores.numpy(), width - k, axis=-1)[:, width - k].copy())[:, None]
    return scores.kthvalue(width - k + 1, dim=-1, keepdim=True).values


def natively(scores: Tensor) -> bool:
    """Whether the compiled search serves these scores (NaN ranks last there)."""
    plain = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numel() > 0
    return plain and library("selection.cpp") is not None


def _search(name: str, rows: Float[Tensor, "rows width"], k: int, out: Tensor) -> None:
    found = library("selection.cpp")
    assert found is not None
    call, width = found[name], rows.shape[1]

    def part(span: slice) -> None:
        call(
            c_void_p(rows[span].data_ptr()), c_int64(span.stop - span.start), c_int64(width), c_int64(k),
            c_void_p(out[span].data_ptr()),
        )  # fmt: skip

    in_parts(len(rows), width * SEARCH_PASSES, part)
