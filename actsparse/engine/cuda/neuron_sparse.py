"""Neuron-sparse MLP: one of gate and up is dense, and decides which rows of the other and of down are read.

CATS (arXiv 2404.08763) keeps |act(gate)| >= t, CHESS (arXiv 2409.01366) has one threshold per neuron, COUNTDOWN
(arXiv 2505.17701) decides by |up|. At best 3 / (1 + 2 * density) of the dense MLP's speed: a third is always read.
"""

from dataclasses import dataclass

from torch import Tensor

from actsparse.engine.cuda import reference
from actsparse.engine.cuda.availability import has_triton


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronPlan:
    """Which neurons to keep, per token: threshold [layers, 1] or [layers, neurons], float32 on the device.

    `first`: "gate" or "up", the dense half; down_rows: [layers, neurons, width].
    """

    threshold: Tensor
    down_rows: Tensor
    first: str = "gate"


def neuron_sparse_mlp(
    gate_up: Tensor, down_rows: Tensor, x: Tensor, threshold: Tensor, activation: str, first: str = "gate"
) -> Tensor:
    """What `reference.neuron_sparse` returns, [width] float32, by Triton kernels that skip rows where they can run."""
    if not (has_triton() and x.is_cuda):
        return reference.neuron_sparse(gate_up, down_rows, x, threshold, activation, first)
    from actsparse.engine.cuda import input_kernels, neuron_kernels

    gate, up = gate_up.chunk(2)
    if first == "gate":
        factor = neuron_kernels.threshold_rows(gate, x, threshold, activation)
        neurons = neuron_kernels.kept_rows(up, x, factor, "identity")
    else:
        factor = neuron_kernels.threshold_rows(up, x, threshold, "identity")
        neurons = neuron_kernels.kept_rows(gate, x, factor, activation)
    out = x.new_empty(down_rows.shape[1])
    nothing = threshold.new_zeros(1)
    input_kernels.product(down_rows, neurons, nothing, None, None, out, add=False, atomics=False)
    return out
