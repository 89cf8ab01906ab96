"""What this machine can run: compiled kernels, Triton, or plain torch; asked once, answered with the reason."""

import functools
import importlib.util

import torch

from actsparse.engine.cuda import native
from actsparse.engine.step.weights import Weights

MAX_INPUTS = 40960  # as float32 beside the rings, in the 227 KiB of a block
MAX_BATCH = 8  # columns of the matrix instruction that a batch's row products are made of
MAX_BATCH_INPUTS = 46_000  # of all sequences together, beside the shortest rings


def has_triton() -> bool:
    """Whether Triton kernels can be launched: the package is there and a CUDA device too."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


@functools.cache
def native_failure() -> str | None:
    """Why the compiled kernels cannot be used on this machine, or None if they can."""
    try:
        native.library()
    except native.NativeError as error:
        return str(error)
    return None


def native_refusal(weights: Weights) -> str | None:
    """Why the compiled kernels cannot serve these weights, or None if they can."""
    shape = weights.shape
    if weights.dtype not in native.DTYPES:
        return f"the compiled kernels take bfloat16 and float16, not {weights.dtype}"
    if not weights.gate_up.is_cuda:
        return "the weights are not on a CUDA device"
    if shape.head_dim not in native.HEAD_DIMS:
        return f"the compiled attention takes head_dim {native.HEAD_DIMS}, not {shape.head_dim}"
    if weights.rope.rotated % 16:
        return f"the compiled attention rotates a multiple of 16 dimensions of a head, not {weights.rope.rotated}"
    odd = [name for name in ("width", "neurons") if getattr(shape, name) % 8]
    if odd:
        return f"the compiled kernels read 16 bytes at a time and {' and '.join(odd)} is no multiple of 8"
    if max(shape.width, shape.neurons, shape.query_width) > MAX_INPUTS:
        return f"the compiled kernels hold up to {MAX_INPUTS} inputs of a product in shared memory"
    return native_failure()


def most_sequences(weights: Weights) -> int:
    """How many sequences of these weights the compiled kernels decode at once."""
    return max(1, min(MAX_BATCH, MAX_BATCH_INPUTS // weights.shape.width))


def batch_refusal(weights: Weights, batch: int) -> str | None:
    """Why the compiled kernels cannot decode `batch` sequences of these weights at once, or None if they can."""
    most = most_sequences(weights)
    return None if batch <= most else f"the compiled kernels decode up to {most} sequences at once here, not {batch}"
