"""How much memory a run held."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: that of the device on CUDA, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
