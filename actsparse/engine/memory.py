"""How much memory a run held."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory held: on CUDA that of the device since `reset_peak`, else that of this process in all its life,
    which cannot be set back."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak(device: torch.device) -> None:
    """Start anew with the peak of a CUDA device, from what is held now; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
