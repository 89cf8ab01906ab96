"""The sites of a loaded model: which modules hold each layer's projections, found through its family's row."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actsparse.errors import ModelError
from actsparse.models.families import Family, family_of
from actsparse.models.projections import (
    WIDE,
    Experts,
    MlpWeights,
    Projection,
    dense_weight,
    in_features,
    input_width,
    is_plain,
    materialise,
)
from actsparse.models.shape import shape_of
from actsparse.results import SHARED_EXPERT, Unit

COVERAGE = 0.95


@dataclass(frozen=True)
class LayerSites:
    """The modules of one decoder layer that activations are read from.

    In a mixture of experts `mlp` is the block of experts, and the parts of an MLP are those of `shared` alone.
    """

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
    def experts(self) -> Experts | None:
        """The routed experts; None in a dense layer."""
        module = None if self.family.experts is None else _walk(self.mlp, self.family.experts)
        if module is None:
            return None
        router, down = _part(self.mlp, self.family.router, self.index), module._parameters.get("down_proj")
        if down is None or down.dim() != 3:
            raise ModelError(
                f"layer {self.index}: '{self.family.experts}' holds no stacked weights 'down_proj'",
                "correct `experts` in the family's row",
            )
        return Experts(module, router, down.shape[0], _top_k(router, self.index), down.shape[2])

    @cached_property
    def shared(self) -> "LayerSites | None":
        """The expert that serves every token, as a layer whose MLP it is; None where there is none."""
        if self.experts is None or self.family.shared is None:
            return None
        return replace(self, mlp=_part(self.mlp, self.family.shared, self.index))

    @property
    def ffns(self) -> tuple["Ffn", ...]:
        """The FFNs of the layer: its MLP, or its experts and then the shared one.

        Not kept here: they know their layer, and in such a cycle a model's weights would outlive it.
        """
        if self.experts is None:
            return (Ffn(self, None),)
        shared = () if self.shared is None else (Ffn(self.shared, SHARED_EXPERT),)
        return (*(Ffn(self, expert) for expert in range(self.experts.count)), *shared)

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
        """Every projection of the layer, a fused one once; of a mixture of experts those outside the routed ones."""
        if self.experts is not None:
            return (*self.qkv, self.output) if self.shared is None else self.shared.linears
        found = [*self.qkv, self.output, self.up, self.down]
        if self.gate is not None and not self.family.fused_gate_up:
            found.append(self.gate)
        return tuple(found)

    @cached_property
    def projections(self) -> dict[Unit, Projection]:
        """Every projection of the layer by its name; fused ones once, as `qkv` and `gate_up`. Of a mixture of experts
        those of the attention."""
        row = self.family
        qkv = (Unit.Q, Unit.K, Unit.V) if len(row.qkv) == 3 else (Unit.QKV,)
        found = [(unit, self.attention, path) for unit, path in zip(qkv, row.qkv, strict=True)]
        found.append((Unit.O, self.attention, row.output))
        if self.experts is None:
            found += self._mlp_paths()
        return {unit: self._projection(unit, parent, path) for unit, parent, path in found}

    def _mlp_paths(self) -> list[tuple[Unit, nn.Module, str]]:
        row = self.family
        if row.fused_gate_up:
            return [(Unit.GATE_UP, self.mlp, row.up), (Unit.DOWN, self.mlp, row.down)]
        gate = [(Unit.GATE, self.mlp, row.gate)] if row.gate else []
        return [*gate, (Unit.UP, self.mlp, row.up), (Unit.DOWN, self.mlp, row.down)]

    def _projection(self, unit: Unit, parent: nn.Module, path: str) -> Projection:
        module = _part(parent, path, self.index)
        return Projection(
            unit, module, parent, path, self.family.transposed, input_width(module, self.family.transposed)
        )

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

    def down_norms(self, neurons: int) -> Float[Tensor, " neurons"]:
        """||w_i|| of every column of the down projection, in float32."""
        return self.down_matrix(neurons).float().norm(dim=0)

    def output_matrix(self, width: int) -> Float[Tensor, "hidden heads_width"]:
        """The output projection of the attention as numbers, [hidden, heads * head_dim], also where quantised."""
        return self._matrix(self.output, width)

    @property
    def neurons(self) -> int:
        """How many neurons the MLP has."""
        if is_plain(self.down):
            return self.down._parameters["weight"].shape[0 if self.family.transposed else 1]  # pyright: ignore[reportOptionalMemberAccess]
        return in_features(self.down, f"layer {self.index}, {self.family.down}")

    def _matrix(self, linear: nn.Module, width: int) -> Tensor:
        weight = linear._parameters.get("weight")
        if weight is not None and weight.is_meta:
            # offloaded: the projection fetches its weights when it runs
            return materialise(linear, width, torch.empty(0, dtype=weight.dtype))
        if is_plain(linear):
            return dense_weight(linear, self.family.transposed, "")[0].detach()
        return materialise(linear, width, next(p for p in self.block.parameters() if p.is_floating_point()))


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network: a layer's MLP (`expert` None), one of its experts, or the shared one."""

    layer: LayerSites
    expert: int | None

    @cached_property
    def width(self) -> int:
        """How many neurons it has."""
        if self.routed is not None:
            return self.routed.width
        return self.layer.neurons

    @property
    def routed(self) -> Experts | None:
        """The experts that it is one of; None where every token passes."""
        return self.layer.experts if self.expert is not None and self.expert != SHARED_EXPERT else None

    def weights(self) -> MlpWeights:
        """Its matrices; raises ModelError on quantised weights."""
        if self.routed is not None and self.expert is not None:
            return self.routed.weights(self.expert)
        return self.layer.mlp_weights()

    def down_matrix(self) -> Float[Tensor, "hidden neurons"]:
        """Its down projection as numbers, also where an MLP's is stored quantised."""
        if self.routed is not None and self.expert is not None:
            return self.routed.stacked()[1][self.expert].detach()
        return self.layer.down_matrix(self.width)

    def down_norms(self) -> Float[Tensor, " neurons"]:
        """||w_i|| of every column of the down projection, in float32."""
        return self.down_matrix().float().norm(dim=0)

    def product(self, a: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens hidden"]:
        """W_d a in float32 (float64 stays), without the bias."""
        down = self.down_matrix()
        return F.linear(a, down) if a.dtype in WIDE else F.linear(a.float(), down.float())


@dataclass(frozen=True)
class ModelSites:
    """The sites of every layer of a model."""

    model: PreTrainedModel
    family: Family
    layers: tuple[LayerSites, ...]

    @property
    def gated(self) -> bool:
        return self.family.gate is not None

    @cached_property
    def ffns(self) -> tuple[Ffn, ...]:
        """The FFNs of every layer in order: one a dense layer, one an expert elsewhere."""
        return tuple(ffn for layer in self.layers for ffn in layer.ffns)

    @cached_property
    def ffn_index(self) -> dict[tuple[int, int | None], int]:
        """The place in `ffns` of each (layer, expert); in a dense model the layer itself."""
        return {(ffn.layer.index, ffn.expert): place for place, ffn in enumerate(self.ffns)}

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that are mixtures of experts."""
        return tuple(layer.index for layer in self.layers if layer.experts is not None)


def dense_linears(sites: ModelSites) -> dict[Unit, Projection]:
    """The projections that every layer has, from the first one (of a mixture of experts those of the attention)."""
    shared = set.intersection(*(set(layer.projections) for layer in sites.layers))
    return {unit: one for unit, one in sites.layers[0].projections.items() if unit in shared}


def unit_widths(sites: ModelSites) -> dict[Unit, int]:
    """How many units a layer has, by kind; layers are alike."""
    widths = {unit: one.width for unit, one in sites.layers[0].projections.items()}
    if sites.layers[0].experts is not None:
        # experts read what the attention reads
        widths |= {Unit.GATE: widths[next(iter(widths))], Unit.UP: widths[next(iter(widths))]}
    return widths | {Unit.NEURON: sites.ffns[0].width, Unit.KV_GROUP: shape_of(sites.model.config).kv_heads}


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


def _top_k(router: nn.Module, layer: int) -> int:
    top_k = getattr(router, "top_k", None)
    if not isinstance(top_k, int):
        raise ModelError(
            f"layer {layer}: the router {type(router).__name__} does not say how many experts it takes (`top_k`)",
            "correct `router` in the family's row",
        )
    return top_k


def _check_coverage(layer: LayerSites) -> None:
    modules = layer.linears if layer.experts is None else (*layer.linears, layer.experts.module, layer.experts.router)
    covered = sum(_stored(module) for module in modules)
    behind = {id(parameter) for module in modules for parameter in module.parameters()}
    total = covered + sum(p.numel() for p in layer.block.parameters() if id(p) not in behind)
    if total and covered < COVERAGE * total:
        raise ModelError(
            f"layer {layer.index}: only {covered / total:.0%} of its parameters lie behind a known site",
            f"the row of family '{layer.family.model_type}' misses a projection",
        )


def _stored(module: nn.Module) -> int:
    """Numbers that a module stores: a quantised projection keeps its weights in buffers."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
