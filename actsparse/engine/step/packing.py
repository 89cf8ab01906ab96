"""From a transformers model to packed weights: what each tier-1 family's layer holds, as one row of a table."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actsparse.engine.step.rope import Rope, model_rope
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.weights import Weights
from actsparse.errors import ModelError
from actsparse.models.projections import dense_weight
from actsparse.models.sites import ModelSites, resolve

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a family differs from Llama.

    `norm_offset` is added to every norm's weight. `windows`: "config" where all layers have the configuration's sliding
    window, "layers" where each layer's type says so.
    """

    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norm: bool = False
    scaled_embedding: bool = False
    multipliers: bool = False
    soft_caps: bool = False
    windows: str = ""
    rope_by_layer: bool = False
    skips_rope: bool = False
    activation: str = "hidden_act"


GEMMA = {"norm_offset": 1.0, "scaled_embedding": True}
TIER_1: dict[str, Traits] = {
    "llama": Traits(),
    "mistral": Traits(windows="config"),
    "qwen2": Traits(windows="layers"),
    "qwen3": Traits(windows="layers", qk_norm=True),
    "smollm3": Traits(windows="layers", skips_rope=True),
    "granite": Traits(multipliers=True),
    "gemma": Traits(**GEMMA),
    "gemma2": Traits(**GEMMA, post_norm=True, soft_caps=True, windows="layers", activation="hidden_activation"),
    "gemma3_text": Traits(
        **GEMMA,
        post_norm=True,
        soft_caps=True,
        qk_norm=True,
        windows="layers",
        rope_by_layer=True,
        activation="hidden_activation",
    ),
    "phi3": Traits(windows="config"),
}


def weights_from_model(model: Any) -> Weights:
    """A packed copy of a tier-1 causal model's weights, on its device.

    Raises ModelError where the family has no step, and where weights are quantised or spread over devices.
    """
    traits = _traits(model)
    sites, config, body = resolve(model), model.config, model.model
    blocks = [layer.block for layer in sites.layers]
    embedding, head = body.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    shape = _shape(sites, traits, embedding, head)
    mlps = [layer.mlp_weights() for layer in sites.layers]
    attentions = [layer.attention for layer in sites.layers]

    def norms(path: str, modules: list[nn.Module]) -> Tensor:
        return torch.stack([_norm(module.get_submodule(path), traits.norm_offset) for module in modules])

    qkv = [[dense_weight(one, False, f"layer {site.index}, qkv") for one in site.qkv] for site in sites.layers]
    out = [dense_weight(site.output, False, f"layer {site.index}, output") for site in sites.layers]
    mlp_norm = "pre_feedforward_layernorm" if traits.post_norm else "post_attention_layernorm"
    return Weights(
        shape=shape,
        embedding=embedding,
        head=embedding if shape.tied else head,
        final_norm=_norm(body.norm, traits.norm_offset),
        attn_norm=norms("input_layernorm", blocks),
        mlp_norm=norms(mlp_norm, blocks),
        post_attn_norm=norms("post_attention_layernorm", blocks) if traits.post_norm else None,
        post_mlp_norm=norms("post_feedforward_layernorm", blocks) if traits.post_norm else None,
        q_norm=norms("q_norm", attentions) if traits.qk_norm else None,
        k_norm=norms("k_norm", attentions) if traits.qk_norm else None,
        qkv=torch.stack([torch.cat([weight.detach() for weight, _ in parts]) for parts in qkv]),
        qkv_bias=_biases([[bias for _, bias in parts] for parts in qkv]),
        out=torch.stack([weight.detach() for weight, _ in out]),
        out_bias=_biases([[bias] for _, bias in out]),
        gate_up=torch.stack([torch.cat([_gate(mlp.gate), mlp.up.detach()]) for mlp in mlps]),
        gate_up_bias=_biases([[mlp.gate_bias, mlp.up_bias] for mlp in mlps]),
        down=torch.stack([mlp.down.detach() for mlp in mlps]),
        down_bias=_biases([[mlp.down_bias] for mlp in mlps]),
        rope=_rope(body.rotary_emb, config, traits, shape.layers),
    )


def share_storage(model: Any, weights: Weights) -> None:
    """Points the model's projections at the packed tensors: one copy in memory, the same values bit for bit."""
    shape = weights.shape
    for index, site in enumerate(resolve(model).layers):
        parts = weights.qkv[index].split(shape.qkv_widths) if len(site.qkv) == 3 else (weights.qkv[index],)
        for module, part in zip(site.qkv, parts, strict=True):
            _point(module, part)
        _point(site.output, weights.out[index])
        gate_up = weights.gate_up[index]
        if site.family.fused_gate_up:
            _point(site.up, gate_up)
        else:
            assert site.gate is not None
            _point(site.gate, gate_up[: shape.neurons])
            _point(site.up, gate_up[shape.neurons :])
        _point(site.down, weights.down[index])


def _point(module: nn.Module, weight: Tensor) -> None:
    module.get_parameter("weight").data = weight


def _traits(model: Any) -> Traits:
    config = model.config
    traits = TIER_1.get(config.model_type)
    if traits is None:
        raise ModelError(
            f"the decode engine has no step of its own for model_type {config.model_type!r}",
            f"its families are {', '.join(TIER_1)}; others run through their own forward",
        )
    activation = getattr(config, traits.activation)
    if activation not in ACTIVATIONS:
        raise ModelError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ModelError(
            "the decode engine keeps a model on one device, and this one is spread over "
            + ", ".join(sorted(str(device) for device in devices)),
            "load it with --device cuda:0",
        )
    return traits


def _shape(sites: ModelSites, traits: Traits, embedding: Tensor, head: Tensor) -> Shape:
    config: Any = sites.model.config
    attention: Any = sites.layers[0].attention
    width = config.hidden_size
    windows = tuple(_window(config, traits, layer) for layer in range(len(sites.layers)))
    embed_scale = config.embedding_multiplier if traits.multipliers else 1.0
    if traits.scaled_embedding:  # rounded as the model rounds it
        embed_scale = float(torch.tensor(width**0.5).to(embedding.dtype))
    return Shape(
        name=config.model_type,
        layers=len(sites.layers),
        width=width,
        neurons=sites.layers[0].mlp_weights().up.shape[0],
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        vocab=head.shape[0],
        norm_epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[getattr(config, traits.activation)],
        tied=embedding.data_ptr() == head.data_ptr(),
        qkv_bias=any(bias is not None for _, bias in (dense_weight(one, False, "") for one in sites.layers[0].qkv)),
        qk_norm=traits.qk_norm,
        post_norm=traits.post_norm,
        attention_scale=float(attention.scaling),
        attention_softcap=config.attn_logit_softcapping if traits.soft_caps else None,
        logit_softcap=config.final_logit_softcapping if traits.soft_caps else None,
        embed_scale=embed_scale,
        residual_scale=config.residual_multiplier if traits.multipliers else 1.0,
        logit_scale=1 / config.logits_scaling if traits.multipliers else 1.0,
        windows=windows if any(windows) else (),
    )


def _window(config: Any, traits: Traits, layer: int) -> int | None:
    if traits.windows == "layers":
        return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    return config.sliding_window if traits.windows == "config" else None


def _rope(rotary: nn.Module, config: Any, traits: Traits, layers: int) -> Rope:
    kinds = tuple(config.layer_types) if traits.rope_by_layer else (None,) * layers
    rotates = tuple(bool(on) for on in config.no_rope_layers) if traits.skips_rope else (True,) * layers
    parameters = config.rope_parameters
    long = not traits.rope_by_layer and parameters["rope_type"] == "longrope"
    return model_rope(rotary, kinds, rotates, parameters["original_max_position_embeddings"] if long else None)


def _norm(module: nn.Module, offset: float) -> Tensor:
    """A norm's weight as the step multiplies by it, float32 (float64 for float64 models)."""
    weight = module.get_parameter("weight").detach()
    return (weight if weight.dtype == torch.float64 else weight.float()) + offset


def _gate(gate: Tensor | None) -> Tensor:
    assert gate is not None, "every tier-1 family has a gated MLP"
    return gate.detach()


def _biases(layers: list[list[Tensor | None]]) -> Tensor | None:
    """[layers, outputs], or None where no layer has any."""
    found = [[bias.detach() for bias in parts if bias is not None] for parts in layers]
    if not any(found):
        return None
    stacked = torch.stack([torch.cat(parts) for parts in found])
    return stacked if stacked.dtype == torch.float64 else stacked.float()
