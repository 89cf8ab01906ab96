"""One call of a model's attention: its keys and values, what of them is in sight, and its inputs kept for later."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Held(Protocol):
    """What a call needs of its layer: which positions have an entry, and the attention function around which it
    stands."""

    present: Bool[Tensor, "batch kv_heads positions"] | None
    base: Callable[..., Tensor]


@dataclass(frozen=True)
class KeptCall:
    """The inputs of one call of the attention, kept to project from later: positions `start` to `stop`."""

    start: int
    stop: int
    args: tuple
    kwargs: dict[str, Any]

    def at(self, places: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The same call for some of its positions, without cache and mask."""
        length = self.stop - self.start

        def part(x: Any) -> Any:
            if isinstance(x, Cache):
                return None
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length:
                return x[:, places.to(x.device)]
            return tuple(part(one) for one in x) if isinstance(x, tuple) else x

        kwargs = {name: part(one) for name, one in self.kwargs.items()}
        absent = {"attention_mask": None} if "attention_mask" in kwargs else {}
        return tuple(part(one) for one in self.args), {**kwargs, **absent}


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface, whose queries stand at positions `start` to `stop`.

    Key column i stands for position `offset` + i: a sliding cache holds the last positions alone, a static one has room
    after `stop`.
    """

    state: Held
    start: int
    query: Float[Tensor, "batch heads seq head_dim"]
    key: Float[Tensor, "batch kv_heads columns head_dim"]
    value: Float[Tensor, "batch kv_heads columns head_dim"]
    mask: Tensor | None
    kwargs: dict[str, Any]

    @property
    def stop(self) -> int:
        return self.start + self.query.shape[2]

    @property
    def offset(self) -> int:
        return max(0, self.stop - self.key.shape[2])

    def outputs(self, places: slice | None = None) -> Float[Tensor, "batch seq heads head_dim"]:
        """The heads' outputs at some positions of the pass (None: all), holes left out of sight."""
        places = slice(0, self.query.shape[2]) if places is None else places
        stop = self.start + places.stop
        columns = self.key.shape[2] if stop == self.stop else stop - self.offset
        mask = self.mask if self.mask is None else self.mask[:, :, places, :columns]
        query, key, value = self.query[:, :, places], self.key[:, :, :columns], self.value[:, :, :columns]
        return self.state.base(query, key, value, self._without_holes(mask, stop, query, columns), self.kwargs)

    def _without_holes(self, mask: Tensor | None, stop: int, query: Tensor, columns: int) -> Tensor | None:
        """The mask with every hole out of sight, but for the query at its own position."""
        present = self.state.present
        assert present is not None
        present = present[:, :, self.offset : stop]
        if present.all():
            return mask
        seen = torch.nn.functional.pad(present, (0, columns - present.shape[2]), value=True)
        seen = seen.repeat_interleave(query.shape[1] // seen.shape[1], dim=1)[:, :, None, :]
        own = torch.arange(stop - query.shape[2], stop, device=seen.device)[:, None]
        positions = torch.arange(self.offset, self.offset + columns, device=seen.device)[None]
        seen = seen | (own == positions)
        if mask is None:
            # the model was left to its causal default
            return seen & (positions <= own)
        if mask.dtype == torch.bool:
            return mask & seen
        return torch.where(seen, mask, torch.finfo(mask.dtype).min)

    def erase(self, start: int, stop: int, which: Bool[Tensor, "batch kv_heads positions"]) -> None:
        """Put zeros in place of entries."""
        first = max(start, self.offset)
        which = which[:, :, first - start :, None]
        for whole in (self.key, self.value):
            whole[:, :, first - self.offset : stop - self.offset].masked_fill_(which, 0.0)

    def fill(
        self, positions: Tensor, which: Bool[Tensor, "batch kv_heads positions"], found: tuple[Tensor, Tensor]
    ) -> None:
        """Put projected entries [batch, kv_heads, positions, head_dim] where they are wanted, as far as still held."""
        held = positions >= self.offset
        columns = positions[held] - self.offset
        for whole, new in zip((self.key, self.value), found, strict=True):
            whole[:, :, columns] = torch.where(which[:, :, held, None], new[:, :, held], whole[:, :, columns])


def base_forward(module: nn.Module, base: str) -> Callable[..., Tensor]:
    """The attention function that the model used before: (query, key, value, mask, kwargs) -> head outputs."""
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    return partial(_call_base, function, module)


def _call_base(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    return function(module, query, key, value, mask, **kwargs)[0]
