"""The bytes of a loaded model's decode step, counted from its parameters."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from actsparse.models.sites import LayerSites, ModelSites
from actsparse.results import StepBytes


def step_bytes(sites: ModelSites) -> StepBytes:
    """What one dense decode step of this model reads."""
    model = sites.model
    embedding, head = embedding_and_head(sites)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    total += sum(_buffers(linear) for layer in sites.layers for linear in layer.linears)
    if head is not embedding:
        total -= embedding.numel() * embedding.element_size()
    return StepBytes(
        layers=len(sites.layers),
        mlp=_mlp_bytes(sites.layers[0]),
        attention=sum(_bytes(module) for layer in sites.layers for module in (*layer.qkv, layer.output)),
        head=head.numel() * head.element_size(),
        total=total,
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids have an input embedding."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0)) or model.config.vocab_size


def embedding_and_head(sites: ModelSites) -> tuple[Tensor, Tensor]:
    """The matrices of the input embedding and of the lm_head (the same tensor when they are tied)."""
    embedding, head = sites.model.get_input_embeddings(), sites.model.get_output_embeddings()
    assert embedding is not None
    return embedding._parameters["weight"], head._parameters["weight"]  # pyright: ignore[reportReturnType, reportOptionalMemberAccess]


def _mlp_bytes(layer: LayerSites) -> dict[str, int]:
    up, down = _bytes(layer.up), _bytes(layer.down)
    if layer.gate is None:
        return {"up": up, "down": down}
    if layer.family.fused_gate_up:
        return {"gate": up // 2, "up": up // 2, "down": down}
    return {"gate": _bytes(layer.gate), "up": up, "down": down}


def _buffers(module: nn.Module) -> int:
    """Bytes of matrices that a quantised projection keeps as buffers."""
    return sum(b.numel() * b.element_size() for b in module.buffers() if b.dim() > 1)


def _bytes(module: nn.Module) -> int:
    """Bytes of a projection's matrix (biases are read whatever is dropped)."""
    stored = [*module.parameters(), *module.buffers()]
    return sum(p.numel() * p.element_size() for p in stored if p.dim() > 1)
