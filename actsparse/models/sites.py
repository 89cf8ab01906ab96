"""The sites of a loaded model: which modules hold each layer's projections, found through its family's row."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from actsparse.errors import ModelError
from actsparse.models.families import Family, family_of

COVERAGE = 0.95


@dataclass(frozen=True)
class MlpWeights:
    """The MLP of a layer as matrices, one row a neuron in `gate`, `up` and `down_rows`.

    gate, up, down_rows: [neurons, hidden] (`gate` None in a non-gated FFN); biases: [neurons] or [hidden].
    """

    gate: Float[Tensor, "neurons hidden"] | None
    up: Float[Tensor, "neurons hidden"]
    down: Float[Tensor, "hidden neurons"]
    gate_bias: Float[Tensor, " neurons"] | None
    up_bias: Float[Tensor, " neurons"] | None
    down_bias: Float[Tensor, " hidden"] | None

    @cached_property
    def down_norms(self) -> Float[Tensor, " neurons"]:
        """||w_i|| of every column of the down projection, in float32."""
        return self.down.float().norm(dim=0)


@dataclass(frozen=True)
class LayerSites:
    """The modules of one decoder layer that activations are read from."""

    index: int
    family: Family
    block: nn.Module
    attention: nn.Module
    mlp: nn.Module

    @cached_property
    def qkv(self) -> tuple[nn.Module, ...]:
        return tuple(_part(self.attention, name, self.index) for name in self.family.qkv)

    @cached_property
    def output(self) -> nn.Module:
        return _part(self.attention, self.family.output, self.index)

    @cached_property
    def gate(self) -> nn.Module | None:
        return None if self.family.gate is None else _part(self.mlp, self.family.gate, self.index)

    @cached_property
    def up(self) -> nn.Module:
        return _part(self.mlp, self.family.up, self.index)

    @cached_property
    def down(self) -> nn.Module:
        return _part(self.mlp, self.family.down, self.index)

    @cached_property
    def activation(self) -> nn.Module:
        return _part(self.mlp, self.family.activation, self.index)

    @cached_property
    def linears(self) -> tuple[nn.Module, ...]:
        """Every projection of the layer, a fused one once."""
        found = [*self.qkv, self.output, self.up, self.down]
        if self.gate is not None and not self.family.fused_gate_up:
            found.append(self.gate)
        return tuple(found)

    def mlp_weights(self) -> MlpWeights:
        """The MLP's matrices as stored, views where the layout allows; raises ModelError on quantised weights."""
        up, up_bias = dense_weight(self.up, self.family.transposed, f"layer {self.index}, {self.family.up}")
        down, down_bias = dense_weight(self.down, self.family.transposed, f"layer {self.index}, {self.family.down}")
        gate = gate_bias = None
        if self.family.fused_gate_up:
            gate, up = up.chunk(2, dim=0)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2, dim=0)
        elif self.gate is not None:
            where = f"layer {self.index}, {self.family.gate}"
            gate, gate_bias = dense_weight(self.gate, self.family.transposed, where)
        return MlpWeights(gate, up, down, gate_bias, up_bias, down_bias)

    def down_matrix(self, neurons: int) -> Float[Tensor, "hidden neurons"]:
        """The down projection as numbers, also where it is stored quantised."""
        return self._matrix(self.down, neurons)

    def output_matrix(self, width: int) -> Float[Tensor, "hidden heads_width"]:
        """The output projection of the attention as numbers, [hidden, heads * head_dim], also where quantised."""
        return self._matrix(self.output, width)

    def _matrix(self, linear: nn.Module, width: int) -> Tensor:
        if is_plain(linear):
            return dense_weight(linear, self.family.transposed, "")[0].detach()
        return materialise(linear, width, next(p for p in self.block.parameters() if p.is_floating_point()))


@dataclass(frozen=True)
class ModelSites:
    """The sites of every layer of a model."""

    model: PreTrainedModel
    family: Family
    layers: tuple[LayerSites, ...]

    @property
    def gated(self) -> bool:
        return self.family.gate is not None


def resolve(model: PreTrainedModel, family: Family | None = None) -> ModelSites:
    """The sites of `model`; raises ModelError on an unknown type, a wrong path, or parameters behind no site."""
    row = family or family_of(model.config.model_type)
    blocks = _walk(model, row.layers)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"family '{row.model_type}': the path '{row.layers}' does not lead to the model's list of layers",
            "correct `layers` in the family's row",
        )
    layers = tuple(
        LayerSites(i, row, block, _part(block, row.attention, i), _part(block, row.mlp, i))
        for i, block in enumerate(blocks)
    )
    for layer in layers:
        _check_coverage(layer)
    return ModelSites(model, row, layers)


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection's weight is a matrix of floating-point numbers."""
    weight = linear._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() == 2


def dense_weight(
    linear: nn.Module, transposed: bool, where: str
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Weight [out, in] and bias of a projection; raises ModelError where it is not stored as plain numbers."""
    weight = linear._parameters.get("weight")
    if weight is None or not is_plain(linear):
        raise ModelError(
            f"{where}: the weights are quantised ({type(linear).__name__}) and cannot be read as numbers",
            "load the model with --dequantize",
        )
    return (weight.t() if transposed else weight), linear._parameters.get("bias")


@torch.no_grad()
def materialise(linear: nn.Module, width: int, like: Tensor) -> Float[Tensor, "out in"]:
    """The matrix that a projection applies, from its answers to unit inputs: also for quantised weights.

    `width` input channels; `like` gives device and dtype of the inputs.
    """
    zero = linear.forward(torch.zeros(1, width, device=like.device, dtype=like.dtype))
    columns = []
    for start in range(0, width, 512):
        stop = min(width, start + 512)
        units = torch.zeros(stop - start, width, device=like.device, dtype=like.dtype)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        columns.append((linear.forward(units) - zero).float())
    return torch.cat(columns).t()


def _walk(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in filter(None, path.split(".")):
        module = module._modules.get(name) if module is not None else None
    return module


def _part(parent: nn.Module, path: str, layer: int) -> nn.Module:
    found = _walk(parent, path)
    if found is None:
        names = ", ".join(name for name, _ in parent.named_children())
        raise ModelError(
            f"layer {layer}: there is no '{path}' in {type(parent).__name__} (it has {names})",
            "correct the path in the family's row",
        )
    return found


def _check_coverage(layer: LayerSites) -> None:
    covered = sum(_stored(linear) for linear in layer.linears)
    behind = {id(parameter) for linear in layer.linears for parameter in linear.parameters()}
    total = covered + sum(p.numel() for p in layer.block.parameters() if id(p) not in behind)
    if total and covered < COVERAGE * total:
        raise ModelError(
            f"layer {layer.index}: only {covered / total:.0%} of its parameters lie behind a known site",
            f"the row of family '{layer.family.model_type}' misses a projection",
        )


def _stored(module: nn.Module) -> int:
    """Numbers that a module stores: a quantised projection keeps its weights in buffers."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
