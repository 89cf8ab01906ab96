"""The byte ceiling of this device, measured: how fast a kernel can read memory that no cache holds."""

import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from actsparse.engine.cuda.availability import native_failure
from actsparse.engine.cuda.operators import Operators
from actsparse.errors import is_out_of_memory

BUFFERS = 4
WARM_UPS = 8  # rounds over all buffers, some 20 ms: a chip that was idle takes a while to raise its clocks
GIBIBYTE = 1 << 30
SMALLEST = 1 << 27  # bytes of a buffer
WIDTH = 4096  # of the matrix as which the engine's own product reads a buffer


def read_bandwidth(device: torch.device, *, buffer_bytes: int = 2 * GIBIBYTE, repeats: int = 12) -> float:
    """Bytes per second of the best reduction at hand that only reads, over rotated buffers: the median of `repeats`.

    A copy would be slower than a step can be, since a step hardly writes. Where memory does not suffice, buffers are
    halved down to `SMALLEST`, which no cache holds either.
    """
    while True:
        try:
            return _read_bandwidth(device, buffer_bytes, repeats)
        except RuntimeError as error:
            if buffer_bytes // 2 < SMALLEST or not is_out_of_memory(error):
                raise
        finally:
            torch.cuda.empty_cache()  # gigabytes that others may want
        buffer_bytes //= 2


def _read_bandwidth(device: torch.device, buffer_bytes: int, repeats: int) -> float:
    buffers = [torch.ones(buffer_bytes // 4, dtype=torch.int32, device=device) for _ in range(BUFFERS)]
    return max(_measure(reader, buffers, repeats) for reader in _readers(device, buffer_bytes))


def _readers(device: torch.device, buffer_bytes: int) -> list[Callable[[Tensor], object]]:
    readers: list[Callable[[Tensor], object]] = [lambda buffer: buffer.view(torch.float32).sum()]
    if native_failure() is None:
        operators = Operators(device)
        x = torch.ones(WIDTH, device=device)
        out = torch.empty(buffer_bytes // (2 * WIDTH), device=device)
        readers.append(lambda buffer: operators.project(out, x, buffer.view(torch.bfloat16).view(-1, WIDTH)))
    if importlib.util.find_spec("triton") is not None:
        from actsparse.engine.cuda import read_kernel

        readers += [
            lambda buffer, shape=shape: read_kernel.read_all(buffer, *shape) for shape in read_kernel.LAUNCH_SHAPES
        ]
    return readers


def _measure(reader: Callable[[Tensor], object], buffers: list[Tensor], repeats: int) -> float:
    for _ in range(WARM_UPS):
        for buffer in buffers:
            reader(buffer)
    size = buffers[0].numel() * buffers[0].element_size()
    reads = max(1, GIBIBYTE // size)  # of a lap: launches weigh little
    milliseconds = []
    for repeat in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for read in range(reads):
            reader(buffers[(repeat * reads + read) % len(buffers)])
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return size * reads / (statistics.median(milliseconds) * 1e-3)
