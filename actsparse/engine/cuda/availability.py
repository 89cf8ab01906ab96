"""What this machine can run: compiled kernels, Triton, or plain torch; asked once, answered with the reason."""

import functools
import importlib.util

import torch

from actsparse.engine.cuda import native
from actsparse.engine.step.weights import Weights

MAX_INPUTS = 40960  # as float32 beside the rings, in the 227 KiB of a block


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


def native_refusal(weights: Weights, batch: int = 1) -> str | None:
    """Why the compiled kernels cannot serve these weights, or None if they can."""
    shape = weights.shape
    if batch > 1:
        return f"the compiled kernels decode one sequence, not {batch}"
    if weights.dtype not in native.DTYPES:
        return f"the compiled kernels take bfloat16 and float16, not {weights.dtype}"
    if not weights.gate_up.is_cuda:
        return "the weights are not on a CUDA device"
    if shape.head_dim not in native.HEAD_DIMS:
        return f"the compiled attention takes head_dim {native.HEAD_DIMS}, not {shape.head_dim}"
    if beyond := _beyond(weights):
        return f"the compiled kernels do not compute {', '.join(beyond)} yet"
    odd = [name for name in ("width", "neurons") if getattr(shape, name) % 8]
    if odd:
        return f"the compiled kernels read 16 bytes at a time and {' and '.join(odd)} is no multiple of 8"
    if max(shape.width, shape.neurons, shape.query_width) > MAX_INPUTS:
        return f"the compiled kernels hold up to {MAX_INPUTS} inputs of a product in shared memory"
    return native_failure()


def _beyond(weights: Weights) -> list[str]:
    shape = weights.shape
    found = {
        "norms of queries and keys": shape.qk_norm,
        "norms after a branch": shape.post_norm,
        "soft caps": shape.attention_softcap is not None or shape.logit_softcap is not None,
        "sliding windows": bool(shape.windows),
        "multipliers": (shape.residual_scale, shape.logit_scale, shape.embed_scale) != (1, 1, 1),
        "rotation of part of a head": weights.rope.rotated != shape.head_dim,
        "biases outside qkv": any(
            one is not None for one in (weights.out_bias, weights.gate_up_bias, weights.down_bias)
        ),
        "an attention scale": shape.score_scale != shape.head_dim**-0.5,
        "exact GELU": shape.activation == "gelu",
    }
    return [name for name, there in found.items() if there]
