"""Weights of a model as decode reads them: fused, stacked over layers, each row contiguous.

Two layouts of a matrix matter. *Output rows* `[outputs, inputs]` (the usual one) for products that read everything;
*input rows* `[inputs, outputs]` for products that skip inputs: a skipped input is then one contiguous row not read. The
transposed down projection serves both neuron sparsity (a row per neuron) and input sparsity, so it is made once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.engine.step.reference import Attention
from actsparse.engine.step.rope import Rope, plain_rope
from actsparse.engine.step.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """Everything that a dense step reads. Norms and biases are float32 (float64 in a float64 model), the rest has the
    model's dtype; what a layer does not have is None.

    embedding, head: [vocab, width] (the same tensor when tied); final_norm: [width];
    attn_norm, mlp_norm, post_attn_norm, post_mlp_norm: [layers, width]; q_norm, k_norm: [layers, head_dim];
    qkv: [layers, qkv_width, width]; out: [layers, width, query_width]; gate_up: [layers, 2 * neurons, width], gate rows
    first; down: [layers, width, neurons]; biases: [layers, outputs].
    """

    shape: Shape
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    attn_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    rope: Rope
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_attn_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None

    def layer(self, index: int) -> "LayerWeights":
        """The weights of one layer, as views."""

        def of(stacked: Tensor | None) -> Tensor | None:
            return None if stacked is None else stacked[index]

        shape = self.shape
        return LayerWeights(
            attn_norm=self.attn_norm[index],
            mlp_norm=self.mlp_norm[index],
            qkv=self.qkv[index],
            out=self.out[index],
            gate_up=self.gate_up[index],
            down=self.down[index],
            qkv_bias=of(self.qkv_bias),
            out_bias=of(self.out_bias),
            gate_up_bias=of(self.gate_up_bias),
            down_bias=of(self.down_bias),
            post_attn_norm=of(self.post_attn_norm),
            post_mlp_norm=of(self.post_mlp_norm),
            attention=Attention(
                scale=shape.score_scale,
                window=shape.window(index),
                softcap=shape.attention_softcap,
                q_norm=of(self.q_norm),
                k_norm=of(self.k_norm),
                epsilon=shape.norm_epsilon,
            ),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.dtype

    @property
    def device(self) -> torch.device:
        return self.gate_up.device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """One layer of `Weights`, and how it attends."""

    attn_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    post_attn_norm: Tensor | None
    post_mlp_norm: Tensor | None
    attention: Attention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputRows:
    """The four products of a layer, input-major, for methods that skip input channels.

    qkv: [layers, width, qkv_width]; out: [layers, query_width, width]; gate_up: [layers, width, 2 * neurons];
    down: [layers, neurons, width].
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


def transpose_rows(stacked: Tensor) -> Tensor:
    """`[layers, rows, columns]` as contiguous `[layers, columns, rows]`, copied a layer at a time to bound memory."""
    layers, rows, columns = stacked.shape
    transposed = stacked.new_empty(layers, columns, rows)
    for layer in range(layers):
        transposed[layer].copy_(stacked[layer].T)
    return transposed


def padded(matrix: Tensor) -> Tensor:
    """`matrix` [rows, columns] with the same values, its rows a multiple of 16 bytes apart and zeros in between."""
    rows, columns = matrix.shape
    grain = 16 // matrix.element_size()
    storage = matrix.new_zeros(rows, -(-columns // grain) * grain)
    storage[:, :columns] = matrix
    return storage[:, :columns]


def input_rows(weights: Weights, down_rows: Tensor | None = None) -> InputRows:
    """Input-major copies of all products of `weights`; `down_rows` `[layers, neurons, width]` is reused if given."""
    return InputRows(
        qkv=transpose_rows(weights.qkv),
        out=transpose_rows(weights.out),
        gate_up=transpose_rows(weights.gate_up),
        down=transpose_rows(weights.down) if down_rows is None else down_rows,
    )


def random_weights(shape: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Weights:
    """Weights of `shape` drawn at random: normal, scaled so that activations keep their size through the layers."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int, scale: float) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    def stacked(rows: int, columns: int) -> Tensor:
        out = torch.empty(shape.layers, rows, columns, dtype=dtype, device=device)
        for layer in out:
            layer.normal_(0.0, columns**-0.5, generator=generator)
        return out

    def norms(width: int) -> Tensor:
        return 1 + 0.1 * torch.randn(shape.layers, width, device=device, generator=generator)

    embedding = draw(shape.vocab, shape.width, scale=1.0)
    exponent = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    bias = torch.randn(shape.layers, shape.qkv_width, device=device, generator=generator) * 0.1
    return Weights(
        shape=shape,
        embedding=embedding,
        head=embedding if shape.tied else draw(shape.vocab, shape.width, scale=shape.width**-0.5),
        final_norm=torch.ones(shape.width, device=device),
        attn_norm=norms(shape.width),
        mlp_norm=norms(shape.width),
        post_attn_norm=norms(shape.width) if shape.post_norm else None,
        post_mlp_norm=norms(shape.width) if shape.post_norm else None,
        q_norm=norms(shape.head_dim) if shape.qk_norm else None,
        k_norm=norms(shape.head_dim) if shape.qk_norm else None,
        qkv=stacked(shape.qkv_width, shape.width),
        qkv_bias=bias if shape.qkv_bias else None,
        out=stacked(shape.width, shape.query_width),
        gate_up=stacked(2 * shape.neurons, shape.width),
        down=stacked(shape.width, shape.neurons),
        rope=plain_rope(shape.rope_theta**-exponent, shape.layers),
    )
