"""What a step counts of what it reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counter:
    """How many units of a layer were read (read [1] int64, over all steps), of `total` a step."""

    layer: int
    unit: str
    read: Tensor
    total: int
