"""Weights behind the sites: projections, experts, and an MLP's matrices as numbers, also where they are quantised."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actsparse.errors import ModelError
from actsparse.results import Unit

WIDE = (torch.float32, torch.float64)


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
class Experts:
    """The routed experts of a layer: `count` FFNs of `width` neurons, of which `top_k` serve a token.

    `module` holds their weights: gate_up_proj [experts, 2 * width, hidden] and down_proj [experts, hidden, width].
    """

    module: nn.Module
    router: nn.Module
    count: int
    top_k: int
    width: int

    def weights(self, expert: int) -> MlpWeights:
        """The matrices of one expert, as views; raises ModelError on quantised weights."""
        gate_up, down = self.stacked()
        gate, up = gate_up[expert].chunk(2, dim=0)
        return MlpWeights(gate, up, down[expert], None, None, None)

    def stacked(self) -> tuple[Float[Tensor, "experts rows hidden"], Float[Tensor, "experts hidden width"]]:
        """The weights of all experts; raises ModelError on quantised ones."""
        found = [self.module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
        gate_up, down = found
        if gate_up is None or down is None or not (gate_up.is_floating_point() and down.is_floating_point()):
            raise ModelError(
                f"the experts are quantised ({type(self.module).__name__}) and cannot be read as numbers",
                "load the model with --dequantize",
            )
        return gate_up, down


@dataclass(frozen=True)
class Projection:
    """A linear of a decoder layer, y = W x + b; `path` leads to it from `parent`."""

    unit: Unit
    module: nn.Module
    parent: nn.Module
    path: str
    transposed: bool
    width: int

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        return self.module._parameters.get("bias")

    def matrix(self) -> Float[Tensor, "out in"]:
        """W as numbers, also where it is stored quantised."""
        if is_plain(self.module):
            return dense_weight(self.module, self.transposed, self.path)[0].detach()
        return materialise(self.module, self.width, next(p for p in self.parent.parameters() if p.is_floating_point()))

    def product(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """W x in float32 (float64 stays), without the bias."""
        if is_plain(self.module):
            weight = self.matrix()
            return F.linear(x, weight) if x.dtype in WIDE else F.linear(x.float(), weight.float())
        bias, y = self.bias, self.module.forward(x)
        return (y if bias is None else y - bias).float()


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection's weight is a matrix of floating-point numbers.

    A quantised tensor may call itself floating: some quantisers keep the linear and replace its weight by a tensor
    subclass that answers for the numbers that it stands for.
    """
    weight = linear._parameters.get("weight")
    if weight is None or is_traceable_wrapper_subclass(weight):
        return False
    return weight.is_floating_point() and weight.dim() == 2


def dense_weight(
    linear: nn.Module, transposed: bool, where: str
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """Weight [out, in] and bias of a projection; raises ModelError where it is not stored as plain numbers."""
    weight = linear._parameters.get("weight")
    if weight is None or not is_plain(linear):
        kept_as = type(linear if weight is None or type(weight) is nn.Parameter else weight).__name__
        raise ModelError(
            f"{where}: the weights are quantised ({kept_as}) and cannot be read as numbers",
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


def input_width(module: nn.Module, transposed: bool) -> int:
    """Input channels of a projection."""
    if is_plain(module):
        return dense_weight(module, transposed, "")[0].shape[1]
    return in_features(module, type(module).__name__)


def in_features(linear: nn.Module, where: str) -> int:
    """How many channels a projection reads, as it says itself; raises ModelError where it does not."""
    found = getattr(linear, "in_features", None)
    if not isinstance(found, int):
        raise ModelError(
            f"{where}: the width of {type(linear).__name__} is not known", "load the model with --dequantize"
        )
    return found
