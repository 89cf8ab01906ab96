"""How much memory a run holds, and whether an error says that there is no more."""

import resource
import sys

import torch


def memory_bytes(device: torch.device) -> int:
    """The most memory held so far: that of the device on CUDA, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a CPU torch's allocator says so in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
