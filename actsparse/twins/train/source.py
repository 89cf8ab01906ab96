"""The model whose text the twins learn from: SmolLM2-135M-Instruct, read straight from its GGUF file.

`transformers` can read the same file, but several times slower and with the wrong pre-tokenizer:
it ignores `tokenizer.ggml.pre`, so runs of digits stay whole. This reader splits them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

CONTROL_TOKEN = 3  # of `tokenizer.ggml.token_type`


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one decoder layer; projections that read the same input lie in one matrix."""

    attn_norm: Float[Tensor, " width"]
    qkv: Float[Tensor, "qkv width"]
    out: Float[Tensor, "width heads_x_dim"]
    mlp_norm: Float[Tensor, " width"]
    gate_up: Float[Tensor, "two_neurons width"]
    down: Float[Tensor, "width neurons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Llama model with tied embeddings."""

    shape: Shape
    embedding: Float[Tensor, "vocab width"]
    layers: tuple[Layer, ...]
    norm: Float[Tensor, " width"]


def read_model(path: Path, device: torch.device, dtype: torch.dtype) -> Source:
    """The weights in `path`, dequantised, on `device`."""
    reader = GGUFReader(path)
    shape = _shape(reader)
    raw = {tensor.name: tensor for tensor in reader.tensors}

    def load(name: str) -> Tensor:
        tensor = raw[name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return torch.from_numpy(values).to(device, dtype)

    def layer(index: int) -> Layer:
        block = f"blk.{index}"
        query = _unpermute(load(f"{block}.attn_q.weight"), shape.heads)
        key = _unpermute(load(f"{block}.attn_k.weight"), shape.kv_heads)
        return Layer(
            attn_norm=load(f"{block}.attn_norm.weight"),
            qkv=torch.cat([query, key, load(f"{block}.attn_v.weight")]),
            out=load(f"{block}.attn_output.weight"),
            mlp_norm=load(f"{block}.ffn_norm.weight"),
            gate_up=torch.cat([load(f"{block}.ffn_gate.weight"), load(f"{block}.ffn_up.weight")]),
            down=load(f"{block}.ffn_down.weight"),
        )

    return Source(
        shape=shape,
        embedding=load("token_embd.weight"),
        layers=tuple(layer(index) for index in range(shape.layers)),
        norm=load("output_norm.weight"),
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`: digits one by one, then byte-level BPE."""
    reader = GGUFReader(path)
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def _shape(reader: GGUFReader) -> Shape:
    return Shape(
        layers=_field(reader, "llama.block_count"),
        heads=_field(reader, "llama.attention.head_count"),
        kv_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.rope.dimension_count"),
        rope_base=_field(reader, "llama.rope.freq_base"),
        epsilon=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
    )


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise KeyError(f"the GGUF file has no field {name}")
    return field.contents()


def _unpermute(weight: Float[Tensor, "heads_x_dim width"], heads: int) -> Float[Tensor, "heads_x_dim width"]:
    """GGUF interleaves the two halves that the rotary embedding pairs; this parts them again."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
