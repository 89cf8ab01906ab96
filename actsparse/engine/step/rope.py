"""Rotary tables by position, asked of the model's own rotary embedding, so that every rope type is the model's.

A layer without rotation has a table of angle zero, so no step needs to know of it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rope:
    """tables(length): cosine and sine, each [tables, length, rotated / 2], float32; of_layer: each layer's table.

    `rotated` of a head's dimensions turn, in pairs (i, i + rotated / 2); the others pass. From sequences of `switch`
    tokens on, all of a model's angles are others (longrope): a cache made before keeps the old ones.
    """

    tables: Callable[[int], tuple[Tensor, Tensor]]
    of_layer: tuple[int, ...]
    rotated: int
    switch: int | None = None


def plain_rope(inverse_frequencies: Tensor, layers: int) -> Rope:
    """One table for all layers: angle = position times inverse_frequencies [rotated / 2]."""

    def tables(length: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(length, device=inverse_frequencies.device)[:, None] * inverse_frequencies
        return angle.cos()[None], angle.sin()[None]

    return Rope(tables=tables, of_layer=(0,) * layers, rotated=2 * inverse_frequencies.numel())


def model_rope(
    rotary: nn.Module, kinds: tuple[str | None, ...], rotates: tuple[bool, ...], switch: int | None = None
) -> Rope:
    """The tables of a transformers rotary embedding, which is copied, since asking some kinds changes them.

    kinds: each layer's name among the module's tables (None where it has one for all); rotates: False for layers
    without rotation. Position p gets the angles of a sequence that ends there, as a decode step would.
    """
    rotary = copy.deepcopy(rotary)
    names = list(dict.fromkeys(kinds))
    of_layer = tuple(names.index(kind) if turns else len(names) for kind, turns in zip(kinds, rotates, strict=True))
    still = len(names) in of_layer

    def tables(length: int) -> tuple[Tensor, Tensor]:
        pairs = [_ask(rotary, name, length) for name in names]
        if still:
            pairs.append((torch.ones_like(pairs[0][0]), torch.zeros_like(pairs[0][0])))
        cosine, sine = zip(*pairs, strict=True)
        return torch.stack(cosine), torch.stack(sine)

    return Rope(tables=tables, of_layer=of_layer, rotated=2 * tables(1)[0].shape[-1], switch=switch)


@torch.no_grad()
def _ask(rotary: Any, kind: str | None, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, rotated / 2] of one kind."""
    buffer = next(rotary.buffers())
    like = torch.empty(1, device=buffer.device)
    named = {} if kind is None else {"layer_type": kind}
    rope_type = rotary.rope_type if kind is None else rotary.rope_type[kind]
    positions = torch.arange(length, device=buffer.device)
    # A table that depends on the sequence's length is asked for position by position.
    one_by_one = "dynamic" in str(rope_type) or rope_type == "longrope"
    parts = positions.split(1) if one_by_one else (positions,)
    asked = [rotary(like, part[None], **named) for part in parts]
    cosine, sine = (torch.cat([both[i][0] for both in asked]) for i in range(2))
    half = cosine.shape[-1] // 2
    return cosine[:, :half].float(), sine[:, :half].float()
