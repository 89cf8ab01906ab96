"""A loaded model, as it is written down: its shape, its feed-forward networks, the bytes of one decode step."""

from dataclasses import dataclass

from actsparse.results.sites import SHARED_EXPERT


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """Weight bytes that one dense batch-1 decode step reads (methods.md, section 0).

    `mlp`: bytes of each MLP matrix of one layer (`gate`, `up`, `down`; no `gate` in a non-gated FFN; of experts, those
    that one token reads, and the mean where layers differ); `projections`: those of each attention matrix of one layer
    (`q`, `k`, `v`, `o`; parts of a fused one by their rows); `attention` and `head` over the whole model; `total`: all
    parameters once, a tied embedding being the lm_head, less an untied input embedding.
    """

    layers: int
    mlp: dict[str, int]
    projections: dict[str, int]
    attention: int
    head: int
    total: int

    @property
    def mlp_total(self) -> int:
        return self.layers * sum(self.mlp.values())

    @property
    def linears(self) -> int:
        """Bytes of the projections of all layers, of the MLP and of the attention."""
        return self.layers * (sum(self.mlp.values()) + sum(self.projections.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRecord:
    """The mixtures of experts of a model: in `layers`, `count` experts of `width` neurons, of which `top_k` serve a
    token, beside a shared one of `shared_width` neurons (None: there is none)."""

    layers: tuple[int, ...]
    count: int
    top_k: int
    width: int
    shared_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnPlace:
    """One feed-forward network of a model: a layer's MLP (`expert` None), or one of its experts.

    `share`: its part of the MLP bytes of its layer that one token reads, on average over experts.
    """

    layer: int
    expert: int | None
    width: int
    share: float


def ffn_places(layers: int, width: int, experts: ExpertsRecord | None) -> tuple[FfnPlace, ...]:
    """The FFNs of a model in order: one a dense layer of `width` neurons, one an expert in its other layers."""
    if experts is None:
        return tuple(FfnPlace(layer=layer, expert=None, width=width, share=1.0) for layer in range(layers))
    read = experts.top_k * experts.width + (experts.shared_width or 0)
    each = experts.top_k * experts.width / experts.count / read
    mixed = [(expert, experts.width, each) for expert in range(experts.count)]
    if experts.shared_width is not None:
        mixed.append((SHARED_EXPERT, experts.shared_width, experts.shared_width / read))
    return tuple(
        FfnPlace(layer=layer, expert=expert, width=size, share=share)
        for layer in range(layers)
        for expert, size, share in (mixed if layer in experts.layers else [(None, width, 1.0)])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A loaded model: the name that was asked for, what it resolved to, its shape, and hashes of its content.

    `family_sha256`: the hash of the row that was brought for it, None where the table has one.
    """

    requested: str
    resolved: str
    revision: str | None
    model_type: str
    activation: str
    gated: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    tied_embeddings: bool
    max_positions: int | None
    dtype: str
    bytes_per_weight: float
    step: StepBytes
    quantization: str | None
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    experts: ExpertsRecord | None = None
    family_sha256: str | None = None

    @property
    def ffns(self) -> tuple[FfnPlace, ...]:
        """Its feed-forward networks in order."""
        return ffn_places(self.layers, self.intermediate_size, self.experts)

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Neurons of each of them: of a layer, or of each FFN in a model with experts."""
        return tuple(place.width for place in self.ffns)
