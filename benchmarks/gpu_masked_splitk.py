"""The published design of an input-sparse product, as a baseline: masked split-K in Triton.

Rebuilt from its description in TEAL (Liu et al., arXiv 2408.14690, section 4.3): the weight is stored input-major, a
program takes one tile of outputs and inputs, masks the loads of the inputs below the threshold, and adds its sums to an
output that has to be cleared first, with atomics.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

# Outputs and inputs of a tile, warps: the baseline takes the best for each shape and sparsity.
CONFIGURATIONS = (
    (64, 128, 4),
    (128, 64, 4),
    (128, 128, 4),
    (256, 32, 4),
    (256, 64, 4),
    (256, 64, 8),
    (512, 16, 4),
    (512, 32, 4),
    (128, 256, 8),
    (256, 128, 8),
    (256, 256, 8),
    (512, 64, 8),
)


def masked_splitk(weight_rows: Tensor, x: Tensor, threshold: float, out: Tensor, configuration: tuple) -> None:
    """out [outputs] = sum of x_i * weight_rows[i] where |x_i| > threshold; weight_rows: [inputs, outputs]."""
    inputs, outputs = weight_rows.shape
    tile_outputs, tile_inputs, warps = configuration
    out.zero_()
    _masked[(triton.cdiv(outputs, tile_outputs), triton.cdiv(inputs, tile_inputs))](
        weight_rows, x, out, threshold, inputs, outputs, OUTPUTS=tile_outputs, INPUTS=tile_inputs, num_warps=warps
    )


def best_of(measure: Callable[[tuple], float]) -> tuple[tuple, float]:
    """The configuration with the smallest time, and that time."""
    timed = [(measure(configuration), configuration) for configuration in CONFIGURATIONS]
    time, configuration = min(timed)
    return configuration, time


@triton.jit
def _masked(weight_ptr, x_ptr, out_ptr, threshold, inputs, outputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    x = tl.load(x_ptr + row, mask=row < inputs, other=0.0)
    keep = tl.abs(x) > threshold
    weight = tl.load(
        weight_ptr + row[:, None] * outputs + column[None, :],
        mask=keep[:, None] & (column < outputs)[None, :],
        other=0.0,
    )
    total = tl.sum(weight.to(tl.float32) * x[:, None], axis=0)
    tl.atomic_add(out_ptr + column, total, mask=column < outputs)
