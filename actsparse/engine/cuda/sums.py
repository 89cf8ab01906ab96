"""Sums that several blocks add to, in fixed point: integers add up to the same bits in any order."""

import torch
from torch import Tensor

ONE = 2**32  # mirrors kernels/common.cuh
LIMIT = 2**57  # sums from here on, either way, are no numbers
INVALID = 2**62


def new_sums(*size: int, device: torch.device) -> Tensor:
    """Zeros of a size; an int64 tensor is what operators take for sums in fixed point."""
    return torch.zeros(size, dtype=torch.int64, device=device)


def to_values(sums: Tensor) -> Tensor:
    """float32 of sums in fixed point, NaN where a part of a sum was none or out of range."""
    return torch.where(sums.abs() < LIMIT, sums.double() / ONE, torch.nan).float()


def to_sums(values: Tensor) -> Tensor:
    """`values` in fixed point."""
    scaled = values.double() * ONE
    return torch.where(scaled.abs() < LIMIT, scaled.round(), float(INVALID)).long()
