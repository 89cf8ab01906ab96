"""Weights of a Llama-like model as batch-1 decode reads them: fused, stacked over layers, each row contiguous.

Two layouts of a matrix matter. *Output rows* `[outputs, inputs]` (the usual one) for products that read everything;
*input rows* `[inputs, outputs]` for products that skip inputs: a skipped input is then one contiguous row not read. The
transposed down projection serves both neuron sparsity (a row per neuron) and input sparsity, so it is made once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actsparse.errors import ModelError

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama-like decoder; `head_dim` times `heads` need not equal `width`."""

    name: str
    layers: int
    width: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.kv_width

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention projections."""
        return self.width * (self.qkv_width + self.query_width)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's gated MLP."""
        return 3 * self.width * self.neurons

    def step_bytes(self, *, position: int, attention: float = 1.0, mlp: float = 1.0, itemsize: int = 2) -> int:
        """Bytes that one decode step must read: the given shares of the layers' weights, the head and the live cache.

        The input embedding contributes one row and is left out.
        """
        weights = self.layers * (attention * self.attention_weights + mlp * self.mlp_weights) + self.vocab * self.width
        cache = self.layers * 2 * self.kv_width * position
        return int((weights + cache) * itemsize)


# Public configurations of the models that the benchmark imitates with random weights.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-2-7b", layers=32, width=4096, neurons=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
        ),
        Shape(
            name="llama-3-8b",
            layers=32,
            width=4096,
            neurons=14336,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=128256,
            rope_theta=500000.0,
        ),
        Shape(name="mistral-7b", layers=32, width=4096, neurons=14336, heads=32, kv_heads=8, head_dim=128, vocab=32000),
        Shape(
            name="qwen2.5-0.5b",
            layers=24,
            width=896,
            neurons=4864,
            heads=14,
            kv_heads=2,
            head_dim=64,
            vocab=151936,
            norm_epsilon=1e-6,
            rope_theta=1000000.0,
            tied=True,
            qkv_bias=True,
        ),
        Shape(
            name="smollm2-135m",
            layers=30,
            width=576,
            neurons=1536,
            heads=9,
            kv_heads=3,
            head_dim=64,
            vocab=49152,
            rope_theta=100000.0,
            tied=True,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """Everything that a dense step reads. Norms and biases are float32, the rest has the model's dtype.

    embedding, head: [vocab, width] (the same tensor when tied); final_norm: [width];
    attn_norm, mlp_norm: [layers, width]; qkv: [layers, qkv_width, width]; qkv_bias: [layers, qkv_width] or None;
    out: [layers, width, query_width]; gate_up: [layers, 2 * neurons, width], gate rows first;
    down: [layers, width, neurons]; inverse_frequencies: [head_dim / 2].
    """

    shape: Shape
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    attn_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor
    inverse_frequencies: Tensor
    rope_scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.dtype

    @property
    def device(self) -> torch.device:
        return self.gate_up.device


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

    def norms() -> Tensor:
        return 1 + 0.1 * torch.randn(shape.layers, shape.width, device=device, generator=generator)

    embedding = draw(shape.vocab, shape.width, scale=1.0)
    exponent = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    return Weights(
        shape=shape,
        embedding=embedding,
        head=embedding if shape.tied else draw(shape.vocab, shape.width, scale=shape.width**-0.5),
        final_norm=torch.ones(shape.width, device=device),
        attn_norm=norms(),
        mlp_norm=norms(),
        qkv=stacked(shape.qkv_width, shape.width),
        qkv_bias=torch.randn(shape.layers, shape.qkv_width, device=device, generator=generator) * 0.1
        if shape.qkv_bias
        else None,
        out=stacked(shape.width, shape.query_width),
        gate_up=stacked(2 * shape.neurons, shape.width),
        down=stacked(shape.width, shape.neurons),
        inverse_frequencies=shape.rope_theta**-exponent,
    )


def weights_from_model(model: Any, *, max_length: int) -> Weights:
    """A packed copy of a transformers Llama, Mistral or Qwen2 causal model's weights, on its device.

    Raises ModelError where the model holds something that the step does not compute.
    """
    config = model.config
    _check(model, max_length)
    body = model.model
    first = body.layers[0]
    shape = Shape(
        name=config.model_type,
        layers=len(body.layers),
        width=config.hidden_size,
        neurons=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.self_attn.head_dim,
        vocab=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
        tied=model.lm_head.weight.data_ptr() == body.embed_tokens.weight.data_ptr(),
        qkv_bias=first.self_attn.q_proj.bias is not None,
    )

    def stack(*projections: str) -> Tensor:
        return torch.stack([torch.cat([_weight(layer, name) for name in projections]) for layer in body.layers])

    embedding = body.embed_tokens.weight.detach()
    bias = None
    if shape.qkv_bias:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        bias = torch.stack(
            [torch.cat([layer.get_submodule(name).bias.detach().float() for name in names]) for layer in body.layers]
        )
    return Weights(
        shape=shape,
        embedding=embedding,
        head=embedding if shape.tied else model.lm_head.weight.detach(),
        final_norm=body.norm.weight.detach().float(),
        attn_norm=torch.stack([layer.input_layernorm.weight.detach().float() for layer in body.layers]),
        mlp_norm=torch.stack([layer.post_attention_layernorm.weight.detach().float() for layer in body.layers]),
        qkv=stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qkv_bias=bias,
        out=stack("self_attn.o_proj"),
        gate_up=stack("mlp.gate_proj", "mlp.up_proj"),
        down=stack("mlp.down_proj"),
        inverse_frequencies=body.rotary_emb.inv_freq.detach().float().clone(),
        rope_scale=float(body.rotary_emb.attention_scaling),
    )


def share_storage(model: Any, weights: Weights) -> None:
    """Points the model's projections at the packed tensors: one copy in memory, the same values bit for bit."""
    shape = weights.shape
    query, kv = shape.query_width, shape.kv_width
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj.weight.data = weights.qkv[index, :query]
        attention.k_proj.weight.data = weights.qkv[index, query : query + kv]
        attention.v_proj.weight.data = weights.qkv[index, query + kv :]
        attention.o_proj.weight.data = weights.out[index]
        mlp.gate_proj.weight.data = weights.gate_up[index, : shape.neurons]
        mlp.up_proj.weight.data = weights.gate_up[index, shape.neurons :]
        mlp.down_proj.weight.data = weights.down[index]


def _weight(layer: Any, name: str) -> Tensor:
    return layer.get_submodule(name).weight.detach()


def _check(model: Any, max_length: int) -> None:
    config = model.config
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"the decode engine has no step of its own for model_type {config.model_type!r}",
            f"its families are {', '.join(FAMILIES)}; others run through their own forward",
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(f"activation {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    layer = model.model.layers[0]
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        if layer.get_submodule(name).bias is not None:
            raise ModelError(f"{config.model_type}: {name} has a bias, which the decode step does not add")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_length > window:
        raise ModelError(
            f"sequences of {max_length} tokens pass the sliding window of {window}",
            f"choose a length up to {window}",
        )
