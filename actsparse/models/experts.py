"""Experts of a mixture, computed one by one where they are read: an implementation of transformers' experts interface.

The model's own implementation computes all experts in one grouped product; while observers look, this one stands in its
place. Its sums are taken in the same order, so on a CPU not a bit differs from the default.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actsparse.results import SiteKind

IMPLEMENTATION = "actsparse"

Observer = Callable[[SiteKind, int, Tensor, Tensor], Tensor | None]
"""(kind, expert, tokens [rows], x [rows, width]) -> an edited x or None; `tokens`: places in the flattened batch."""

# the interface hands over a module and nothing else, so what looks at it is found by the module
_observers: WeakKeyDictionary[nn.Module, list[Observer]] = WeakKeyDictionary()


@contextmanager
def observed(model: PreTrainedModel, observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """Compute experts one by one while the block runs, and show each module's activations to its observer."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    before = model.config._experts_implementation
    for module, observer in observers.items():
        _observers.setdefault(module, []).append(observer)
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.config._experts_implementation = before
        for module in observers:
            _observers[module].pop()


def experts_forward(
    module: nn.Module,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens top_k"],
    top_k_weights: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """The weighted sum of every token's experts, each of them act(gate) * up, then down."""
    top_k = top_k_index.shape[-1]
    gate_up, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
    activation = module._modules["act_fn"]
    assert gate_up is not None
    assert down is not None
    assert activation is not None
    experts, order = torch.sort(top_k_index.reshape(-1))
    tokens = order // top_k
    outputs: list[Tensor] = []
    start = 0
    for expert, count in enumerate(torch.bincount(experts, minlength=down.shape[0]).tolist()):
        if not count:
            continue
        rows = tokens[start : start + count]
        start += count
        gate, up = F.linear(hidden_states[rows], gate_up[expert]).chunk(2, dim=-1)
        gate = _shown(module, SiteKind.GATE, expert, rows, activation(gate))
        up = _shown(module, SiteKind.UP, expert, rows, up)
        neurons = _shown(module, SiteKind.NEURON, expert, rows, gate * up)
        outputs.append(F.linear(neurons, down[expert]))
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(len(hidden_states), top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _shown(module: nn.Module, kind: SiteKind, expert: int, tokens: Tensor, x: Tensor) -> Tensor:
    for observer in _observers.get(module, ()):
        edited = observer(kind, expert, tokens, x)
        x = x if edited is None else edited
    return x
