"""A model without the neurons that a fixed mask drops, as a smaller checkpoint that plain transformers loads."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from actsparse.errors import ModelError, PlanError
from actsparse.models.projections import is_plain
from actsparse.models.sites import LayerSites, ModelSites

WIDTH_NAMES = {"opt": "ffn_dim", "gpt2": "n_inner", "gptj": "n_inner", "falcon": "ffn_hidden_size"}
"""The configuration's name for the width of the FFN, where it is not `intermediate_size`."""

BIAS_FLAG = "mlp_bias"


def check_exportable(sites: ModelSites, masks: Sequence[Bool[Tensor, " neurons"]], *, filled: bool) -> None:
    """Raise PlanError or ModelError, with the reason, where plain transformers cannot hold the smaller model."""
    config, kind = sites.model.config, sites.model.config.model_type
    counts = [int(mask.sum()) for mask in masks]
    if len(set(counts)) > 1:
        raise PlanError(
            f"the plan keeps from {min(counts)} to {max(counts)} neurons a layer, and a configuration has one width",
            "export a plan that drops the same share in every layer",
        )
    for layer in sites.layers:
        if layer.experts is not None:
            raise ModelError(
                f"layer {layer.index} is a mixture of experts, and a mask over neurons does not say what of each expert"
                " is kept",
                "use the plan with actsparse.sparsify",
            )
        if any(not is_plain(module) for module in (layer.up, layer.down)):
            raise ModelError(
                f"layer {layer.index} has quantised weights, which cannot be cut", "load with --dequantize"
            )
    name = WIDTH_NAMES.get(kind, "intermediate_size")
    if not hasattr(config, name) or getattr(config, name) not in (len(masks[0]), None):
        raise ModelError(
            f"model type '{kind}' cannot be exported smaller: its configuration has no width of the FFN ({name})",
            "use the plan with actsparse.sparsify, or a model of another family",
        )
    if filled and sites.layers[0].down._parameters.get("bias") is None and not hasattr(config, BIAS_FLAG):
        raise ModelError(
            f"model type '{kind}' has no bias in the down projection, so `compensate` cannot be exported",
            "export the plan without compensate=true",
        )


@torch.no_grad()
def smaller_model(
    sites: ModelSites,
    masks: Sequence[Bool[Tensor, " neurons"]],
    fills: Sequence[Float[Tensor, " neurons"] | None],
) -> PreTrainedModel:
    """A new model whose FFNs have the kept neurons alone, in their order; `fills` are what dropped neurons are taken to
    be, added as a bias of the down projection. The given model stays as it is. Raises as `check_exportable`."""
    filled = any(fill is not None for fill in fills)
    check_exportable(sites, masks, filled=filled)
    config = deepcopy(sites.model.config)
    setattr(config, WIDTH_NAMES.get(config.model_type, "intermediate_size"), int(masks[0].sum()))
    if filled and sites.layers[0].down._parameters.get("bias") is None:
        setattr(config, BIAS_FLAG, True)
    made = AutoModelForCausalLM.from_config(config, dtype=sites.model.dtype)
    made.load_state_dict(_smaller_state(sites, masks, fills), strict=True, assign=True)
    made.tie_weights()
    made.generation_config = deepcopy(sites.model.generation_config)
    return made.eval()


def save_smaller(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer to a folder that `from_pretrained` reads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _smaller_state(sites: ModelSites, masks: Sequence[Tensor], fills: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The state of the smaller model: the whole one's, with the matrices of every FFN replaced."""
    state: dict[str, Any] = dict(sites.model.state_dict())
    names = {id(module): name for name, module in sites.model.named_modules()}
    for layer, mask, fill in zip(sites.layers, masks, fills, strict=True):
        for module, parts in _cut(layer, mask, fill).items():
            state |= {f"{names[id(module)]}.{part}": value.contiguous() for part, value in parts.items()}
    return state


def _cut(layer: LayerSites, mask: Tensor, fill: Tensor | None) -> Mapping[nn.Module, dict[str, Tensor]]:
    """New weights and biases of the projections of one FFN."""
    transposed, kept = layer.family.transposed, mask.nonzero().squeeze(1).to(layer.down._parameters["weight"].device)  # pyright: ignore[reportOptionalMemberAccess]
    encoders = {module for module in (layer.gate, layer.up) if module is not None}
    bias_everywhere = fill is not None and layer.down._parameters.get("bias") is None
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for module in encoders:
        halves = 2 if layer.family.fused_gate_up else 1
        rows = torch.cat([kept + half * len(mask) for half in range(halves)])
        weight, bias = _parameters(module)
        parts = {"weight": weight.index_select(1 if transposed else 0, rows)}
        if bias is not None:
            parts["bias"] = bias.index_select(0, rows)
        elif bias_everywhere:
            parts["bias"] = weight.new_zeros(len(rows))
        found[module] = parts
    weight, bias = _parameters(layer.down)
    parts = {"weight": weight.index_select(0 if transposed else 1, kept)}
    if fill is not None:
        constant = layer.down_matrix(len(mask)).float() @ torch.where(mask, 0.0, fill.float()).to(weight.device)
        bias = constant.to(weight.dtype) if bias is None else (bias.float() + constant).to(weight.dtype)
    if bias is not None:
        parts["bias"] = bias
    found[layer.down] = parts
    return found


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    return weight.detach(), None if bias is None else bias.detach()
