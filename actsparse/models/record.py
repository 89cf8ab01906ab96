"""The record of a loaded model: its shape, dtype, and hashes of what it was loaded from."""

import hashlib
from enum import Enum
from pathlib import Path

from actsparse.models.cost import embedding_and_head, step_bytes, stored_bytes
from actsparse.models.home import file_sha256
from actsparse.models.preflight import weight_files
from actsparse.models.shape import optional_int, shape_of
from actsparse.models.sites import ModelSites
from actsparse.models.sources import Source
from actsparse.results import ExpertsRecord, FfnPlace, ModelRecord, ffn_places

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.jinja", "*.model", "*tokens*.json", "*.tiktoken")


def record(requested: str, source: Source, sites: ModelSites, family_sha256: str | None = None) -> ModelRecord:
    """What is known of the model behind `sites`; `family_sha256`: the hash of a row that was brought for it."""
    model, config = sites.model, sites.model.config
    shape = shape_of(config)
    embedding, head = embedding_and_head(sites)
    parameters = sum(p.numel() for p in model.parameters())
    quantization = getattr(config, "quantization_config", None)
    return ModelRecord(
        requested=requested,
        resolved=source.resolved,
        revision=source.revision,
        model_type=config.model_type,
        activation=activation_of(sites),
        gated=sites.gated,
        layers=len(sites.layers),
        hidden_size=shape.hidden,
        intermediate_size=_intermediate_size(sites),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=config.vocab_size,
        parameters=parameters,
        tied_embeddings=embedding is head,
        max_positions=optional_int(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        dtype=str(model.dtype).removeprefix("torch."),
        bytes_per_weight=_bytes_per_weight(sites),
        step=step_bytes(sites),
        quantization=quantization_name(quantization),
        weights_sha256=_combined(weight_files(source.directory, allow_pickle=True)),
        config_sha256=file_sha256(source.directory / "config.json"),
        tokenizer_sha256=_combined(sorted({file for name in TOKENIZER_FILES for file in source.directory.glob(name)})),
        experts=experts_record(sites),
        family_sha256=family_sha256,
    )


def places_of(sites: ModelSites) -> tuple[FfnPlace, ...]:
    """The model's feed-forward networks in order."""
    return ffn_places(len(sites.layers), _intermediate_size(sites), experts_record(sites))


def _intermediate_size(sites: ModelSites) -> int:
    """Neurons of a dense layer's MLP; of an expert where no layer is dense."""
    dense = [layer for layer in sites.layers if layer.experts is None]
    return dense[0].neurons if dense else sites.ffns[0].width


def experts_record(sites: ModelSites) -> ExpertsRecord | None:
    """The mixtures of experts of a model; None where it has none."""
    if not sites.moe_layers:
        return None
    layer = sites.layers[sites.moe_layers[0]]
    assert layer.experts is not None
    return ExpertsRecord(
        layers=sites.moe_layers,
        count=layer.experts.count,
        top_k=layer.experts.top_k,
        width=layer.experts.width,
        shared_width=None if layer.shared is None else layer.shared.neurons,
    )


def activation_of(sites: ModelSites) -> str:
    """The name of the FFN's activation function."""
    model = sites.model
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    found = next((value for name in names if isinstance(value := getattr(model.config, name, None), str)), None)
    if found is not None:
        return found
    layer = sites.layers[0]
    return type(layer.activation if layer.experts is None else layer.experts.module._modules["act_fn"]).__name__


def _bytes_per_weight(sites: ModelSites) -> float:
    """Stored bytes over weights of the layers' projections."""
    linears = [linear for layer in sites.layers for linear in layer.linears]
    linears += [layer.experts.module for layer in sites.layers if layer.experts is not None]
    stored = [p for linear in linears for p in (*linear.parameters(), *linear.buffers())]
    weights = sum(
        int(getattr(linear, "in_features", 0)) * int(getattr(linear, "out_features", 0)) or _numel(linear)
        for linear in linears
    )
    return round(sum(stored_bytes(p) for p in stored) / max(1, weights), 4)


def _numel(linear: object) -> int:
    return sum(p.numel() for p in linear.parameters() if p.dim() > 1)  # pyright: ignore[reportAttributeAccessIssue]


def quantization_name(quantization: object) -> str | None:
    if quantization is None:
        return None
    stored = (
        quantization
        if isinstance(quantization, dict)
        else {"quant_method": getattr(quantization, "quant_method", None)}
    )
    method = stored.get("quant_method")
    return str(method.value if isinstance(method, Enum) else method or "unknown")


def _combined(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
