"""The products of the torch step on a GPU without compiled kernels: Triton kernels that skip rows, at batch 1.

Import only where triton is installed (`availability.has_triton`).
"""

import torch
from torch import Tensor

from actsparse.engine.cuda import input_kernels, neuron_kernels
from actsparse.engine.step.products import TorchProducts


class TritonProducts(TorchProducts):
    """`Products` whose sparse products read kept rows only where one sequence is decoded."""

    def neuron_sparse(
        self,
        gate_up: Tensor,
        down_rows: Tensor,
        x: Tensor,
        threshold: Tensor,
        activation: str,
        first: str,
        bias: Tensor | None,
    ) -> Tensor:
        if x.shape[0] > 1 or bias is not None or activation not in neuron_kernels.CODES:
            return super().neuron_sparse(gate_up, down_rows, x, threshold, activation, first, bias)
        gate, up = gate_up.chunk(2)
        if first == "gate":
            factor = neuron_kernels.threshold_rows(gate, x[0], threshold, activation)
            neurons = neuron_kernels.kept_rows(up, x[0], factor, "identity")
        else:
            factor = neuron_kernels.threshold_rows(up, x[0], threshold, "identity")
            neurons = neuron_kernels.kept_rows(gate, x[0], factor, activation)
        return self.input_sparse(down_rows, neurons[None], threshold.new_zeros(1), None, None)

    def input_sparse(
        self, weight_rows: Tensor, x: Tensor, threshold: Tensor, score: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if x.shape[0] > 1:
            return super().input_sparse(weight_rows, x, threshold, score, bias)
        out = torch.empty(1, weight_rows.shape[1], dtype=torch.float32, device=x.device)
        input_kernels.product(weight_rows, x[0], threshold, score, bias, out[0], add=False, atomics=False)
        return out
