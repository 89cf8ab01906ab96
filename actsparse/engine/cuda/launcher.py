"""What every launch of the compiled kernels shares: the library, launch shapes, and which launches start early."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.cuda import native

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "identity": 3, "gelu": 4}


class Norm(NamedTuple):
    """RMSNorm applied to a product's input: weight [width], float32."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Launch shapes. Blocks that leave room beside them let the next kernel's blocks start and fill their rings early.

    `ahead`: rows that a warp of a sparse product, which has 4 under way, starts to read before it knows which are kept;
    `later`: how many more under a norm, once the inputs are on their way.
    `rows_deep`: longer rings in the dense products. `max_slices`: of the inputs of a sparse product whose blocks meet.
    `batch_columns_shared`: bytes of shared memory for a block of their sparse products, at most.
    `tensor_columns_from`: batches whose sparse products run on tensor cores, 3 to 5.
    `batch_depth`: stages of the rings in the row products of a batch, of 16 KiB a block, where they fit.
    """

    rows_threads: int = 512
    rows_blocks_per_sm: int = 2
    rows_deep: bool = False
    columns_blocks_per_sm: int = 2
    ahead: int = 1
    later: int = 1
    max_slices: int = 16
    batch_blocks_per_sm: int = 1
    batch_depth: int = 8
    tensor_columns_from: int = 5
    batch_columns_shared: int = 226 * 1024


class Launcher:
    """The loaded kernels and launch shapes for one device."""

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self._library = native.library()
        self._tuning = tuning or Tuning()
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._chained = False
        self._dependent = False

    @contextmanager
    def chain(self) -> Iterator[None]:
        """Launches inside start while their predecessor ends and read weights and cache before waiting for it.

        The first waits for all work before it. Nothing else may launch inside, and no kernel inside may change the
        weights, the position or the cache below it before the last one.
        """
        self._chained, self._dependent = True, False
        try:
            yield
        finally:
            self._chained = self._dependent = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Other work on the device inside a chain: it waits for what came before, and the next kernel waits for it."""
        yield
        self._dependent = False

    def _starts_early(self) -> bool:
        early, self._dependent = self._dependent, self._chained
        return early
