"""The only place that reads a clock."""

import time
from collections.abc import Callable

import torch


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, the device waited for before and after."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
