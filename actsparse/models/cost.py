"""The bytes of a loaded model's decode step, counted from its parameters."""

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from actsparse.models.shape import shape_of
from actsparse.models.sites import LayerSites, ModelSites
from actsparse.results import StepBytes


def step_bytes(sites: ModelSites) -> StepBytes:
    """What one dense decode step of this model reads."""
    model = sites.model
    embedding, head = embedding_and_head(sites)
    total = sum(stored_bytes(p) for p in model.parameters())
    total += sum(_buffers(linear) for layer in sites.layers for linear in layer.linears)
    total -= sum(_idle_bytes(layer) for layer in sites.layers)
    if head is not embedding:
        total -= stored_bytes(embedding)
    return StepBytes(
        layers=len(sites.layers),
        mlp=_mean_mlp_bytes(sites),
        projections=_attention_bytes(sites.layers[0], sites),
        attention=sum(_bytes(module) for layer in sites.layers for module in (*layer.qkv, layer.output)),
        head=stored_bytes(head),
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


def _mean_mlp_bytes(sites: ModelSites) -> dict[str, int]:
    """Bytes of each MLP matrix of a layer, the mean where layers differ (dense ones among mixtures of experts)."""
    if not sites.moe_layers:
        return _mlp_bytes(sites.layers[0])
    found = [_mlp_bytes(layer) for layer in sites.layers]
    return {name: round(sum(one[name] for one in found) / len(found)) for name in found[0]}


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor occupies; of a quantised tensor those of its parts, not of the numbers it stands for."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _mlp_bytes(layer: LayerSites) -> dict[str, int]:
    """Bytes of each matrix; of a mixture those that one token reads: top_k of the experts, and the shared one."""
    if layer.experts is not None:
        gate_up, down = (stored_bytes(one) // len(one) for one in layer.experts.stacked())
        shared = {} if layer.shared is None else _mlp_bytes(layer.shared)
        routed = {"gate": gate_up // 2, "up": gate_up // 2, "down": down}
        return {name: layer.experts.top_k * size + shared.get(name, 0) for name, size in routed.items()}
    up, down = _bytes(layer.up), _bytes(layer.down)
    if layer.gate is None:
        return {"up": up, "down": down}
    if layer.family.fused_gate_up:
        return {"gate": up // 2, "up": up // 2, "down": down}
    return {"gate": _bytes(layer.gate), "up": up, "down": down}


def _idle_bytes(layer: LayerSites) -> int:
    """Bytes of the experts that a token does not pass through: (1 - top_k / E) of them all."""
    if layer.experts is None:
        return 0
    whole = sum(stored_bytes(one) for one in layer.experts.stacked())
    return whole - whole * layer.experts.top_k // layer.experts.count


def _attention_bytes(layer: LayerSites, sites: ModelSites) -> dict[str, int]:
    """Bytes of q, k, v and o; a fused matrix is divided as its rows are."""
    output = _bytes(layer.output)
    if len(layer.qkv) == 3:
        return {name: _bytes(one) for name, one in zip(("q", "k", "v"), layer.qkv, strict=True)} | {"o": output}
    shape = shape_of(sites.model.config)
    whole, rows = _bytes(layer.qkv[0]), shape.heads + 2 * shape.kv_heads
    kv = whole * shape.kv_heads // rows
    return {"q": whole - 2 * kv, "k": kv, "v": kv, "o": output}


def _buffers(module: nn.Module) -> int:
    """Bytes of matrices that a quantised projection keeps as buffers."""
    return sum(stored_bytes(b) for b in module.buffers() if b.dim() > 1)


def _bytes(module: nn.Module) -> int:
    """Bytes of a projection's matrix (biases are read whatever is dropped)."""
    stored = [*module.parameters(), *module.buffers()]
    return sum(stored_bytes(p) for p in stored if p.dim() > 1)
