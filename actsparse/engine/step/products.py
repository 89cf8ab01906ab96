"""The products of a step as one object, so that an engine brings its own and the step stays one piece of code."""

from typing import Protocol

from torch import Tensor

from actsparse.engine.step import reference


class Products(Protocol):
    """Activations x: [batch, inputs], float32 (float64 for float64 weights); results likewise. Weight rows as named."""

    def project(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """[batch, outputs]: weight [outputs, inputs] times x, plus bias [outputs]."""
        ...

    def project_rows(self, weight_rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """[batch, outputs]: the sums of x_i * weight_rows[i]; weight_rows [inputs, outputs]."""
        ...

    def gated(self, gate_up: Tensor, x: Tensor, activation: str, bias: Tensor | None) -> Tensor:
        """[batch, neurons]: act(gate x) * (up x); gate_up [2 * neurons, width], gate rows first."""
        ...

    def indexed_mlp(
        self,
        gate_up: Tensor,
        down_rows: Tensor,
        index: Tensor,
        count: Tensor,
        x: Tensor,
        activation: str,
        bias: Tensor | None,
    ) -> Tensor:
        """[batch, width]: the gated MLP of the neurons index[:count]; index [capacity], count [1]."""
        ...

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
        """[batch, width]: `reference.neuron_sparse`."""
        ...

    def input_sparse(
        self, weight_rows: Tensor, x: Tensor, threshold: Tensor, score: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """[batch, outputs]: `reference.input_sparse`."""
        ...


class TorchProducts:
    """`Products` in plain torch: exact, and reading every weight."""

    def project(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.project(weight, x, bias)

    def project_rows(self, weight_rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.project_rows(weight_rows, x, bias)

    def gated(self, gate_up: Tensor, x: Tensor, activation: str, bias: Tensor | None) -> Tensor:
        return reference.gated(gate_up, x, activation, bias)

    def indexed_mlp(
        self,
        gate_up: Tensor,
        down_rows: Tensor,
        index: Tensor,
        count: Tensor,
        x: Tensor,
        activation: str,
        bias: Tensor | None,
    ) -> Tensor:
        neurons = gate_up.shape[0] // 2
        both = gate_up.view(2, neurons, -1)[:, index].flatten(0, 1)
        some = None if bias is None else bias.view(2, neurons)[:, index].flatten()
        live = index.new_ones(index.shape).cumsum(0) <= count
        return reference.project_rows(down_rows[index], reference.gated(both, x, activation, some) * live)

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
        return reference.neuron_sparse(gate_up, down_rows, x, threshold, activation, first, bias)

    def input_sparse(
        self, weight_rows: Tensor, x: Tensor, threshold: Tensor, score: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return reference.input_sparse(weight_rows, x, threshold, score, bias)
