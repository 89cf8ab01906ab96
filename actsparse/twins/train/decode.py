"""One decode step of a Llama model for many rows, each at its own position: made for graph capture.

Prompts are fed token by token through the same step, so there is no prefill: a tenth to a fifth of
the work, against a second code path.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.twins.train.source import Shape, Source


class Decoder:
    """Logits of the next token, for `rows` sequences of at most `positions` tokens."""

    def __init__(self, source: Source, rows: int, positions: int) -> None:
        shape, embedding = source.shape, source.embedding
        self._source = source
        size = (shape.layers, rows, shape.kv_heads, positions, shape.head_dim)
        self._keys = torch.zeros(size, device=embedding.device, dtype=embedding.dtype)
        self._values = torch.zeros_like(self._keys)
        self._rotation = _rotation(shape, positions, embedding.device)
        on_gpu = embedding.is_cuda
        self._project = torch.compile(_project, dynamic=False) if on_gpu else _project
        self._mix = torch.compile(_mix, dynamic=False) if on_gpu else _mix
        self._attend = _attention_kernel() if on_gpu else attend

    def __call__(self, token: Int[Tensor, " batch"], position: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        source, shape = self._source, self._source.shape
        rotation = self._rotation[position]
        hidden = source.embedding[token]
        for layer, keys, values in zip(source.layers, self._keys, self._values, strict=True):
            query, key, value = self._project(hidden, rotation, layer.attn_norm, layer.qkv, shape)
            mixed = self._attend(query, key, value, keys, values, position)
            hidden = self._mix(
                hidden,
                mixed,
                layer.out,
                layer.mlp_norm,
                layer.gate_up,
                layer.down,
                shape.epsilon,
            )
        return _rms_norm(hidden, source.norm, shape.epsilon) @ source.embedding.T


def attend(
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads head_dim"],
    value: Float[Tensor, "batch kv_heads head_dim"],
    keys: Float[Tensor, "batch kv_heads positions head_dim"],
    values: Float[Tensor, "batch kv_heads positions head_dim"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch heads head_dim"]:
    """Attention over the cache and the new token, which is added to the cache."""
    row = torch.arange(len(position), device=position.device)
    keys[row, :, position], values[row, :, position] = key, value
    seen = torch.arange(keys.shape[2], device=position.device) <= position[:, None]
    return F.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True
    )[:, :, 0]


def _attention_kernel() -> Callable[..., Float[Tensor, "batch heads head_dim"]]:
    from actsparse.twins.train.attention_kernel import attend_fused

    return attend_fused


def _project(
    hidden: Float[Tensor, "batch width"],
    rotation: Float[Tensor, "batch two half"],
    norm: Float[Tensor, " width"],
    weight: Float[Tensor, "qkv width"],
    shape: Shape,
) -> tuple[
    Float[Tensor, "batch heads head_dim"],
    Float[Tensor, "batch kv_heads head_dim"],
    Float[Tensor, "batch kv_heads head_dim"],
]:
    """Rotated queries, rotated keys, values."""
    projected = _rms_norm(hidden, norm, shape.epsilon) @ weight.T
    heads = projected.view(len(hidden), -1, shape.head_dim)
    query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    return _rotate(query, rotation), _rotate(key, rotation), value.contiguous()


def _mix(
    hidden: Float[Tensor, "batch width"],
    mixed: Float[Tensor, "batch heads head_dim"],
    out: Float[Tensor, "width heads_x_dim"],
    norm: Float[Tensor, " width"],
    gate_up: Float[Tensor, "two_neurons width"],
    down: Float[Tensor, "width neurons"],
    epsilon: float,
) -> Float[Tensor, "batch width"]:
    """The layer's output from its input and its attention."""
    hidden = hidden + mixed.flatten(1) @ out.T
    gate, up = (_rms_norm(hidden, norm, epsilon) @ gate_up.T).chunk(2, dim=-1)
    return hidden + (F.silu(gate) * up) @ down.T


def _rms_norm(
    hidden: Float[Tensor, "batch width"], weight: Float[Tensor, " width"], epsilon: float
) -> Float[Tensor, "batch width"]:
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale).to(hidden.dtype) * weight


def _rotation(shape: Shape, positions: int, device: torch.device) -> Float[Tensor, "positions two half"]:
    """Cosines and sines of every position."""
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angle = torch.arange(positions, device=device)[:, None] / shape.rope_base**half
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(
    heads: Float[Tensor, "batch heads head_dim"], rotation: Float[Tensor, "batch two half"]
) -> Float[Tensor, "batch heads head_dim"]:
    cosine, sine = rotation[:, 0, None], rotation[:, 1, None]
    first, second = heads.float().chunk(2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.cat(turned, dim=-1).to(heads.dtype)
