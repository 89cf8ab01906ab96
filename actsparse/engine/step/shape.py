"""The sizes and constants of a decoder that the engine has a step of its own for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of RMS norms, rotary attention and gated MLPs; `head_dim` times `heads` need not equal `width`.

    `windows`: per layer, how many positions a token sees, itself among them (None: all); empty for none anywhere.
    `attention_scale` None is head_dim ** -0.5. `attention_softcap`, `logit_softcap`: x becomes cap * tanh(x / cap).
    What a branch adds to the residual is multiplied by `residual_scale`, logits by `logit_scale`, embeddings by
    `embed_scale`. `qkv_bias`, `qk_norm`, `post_norm` and `rope_theta` say what random weights of this shape hold.
    """

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
    qk_norm: bool = False
    post_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    windows: tuple[int | None, ...] = ()

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
    def qkv_widths(self) -> tuple[int, int, int]:
        return self.query_width, self.kv_width, self.kv_width

    @property
    def score_scale(self) -> float:
        """What a query times a key is multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention projections."""
        return self.width * (self.qkv_width + self.query_width)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's gated MLP."""
        return 3 * self.width * self.neurons

    def window(self, layer: int) -> int | None:
        """How many positions a token of `layer` sees, itself among them; None for all."""
        return self.windows[layer] if self.windows else None

    def step_bytes(self, *, position: int, attention: float = 1.0, mlp: float = 1.0, itemsize: int = 2) -> int:
        """Bytes that one decode step must read: the given shares of the layers' weights, the head and the live cache.

        The input embedding contributes one row and is left out.
        """
        weights = self.layers * (attention * self.attention_weights + mlp * self.mlp_weights) + self.vocab * self.width
        live = sum(min(position, self.window(layer) or position) for layer in range(self.layers))
        return int((weights + 2 * self.kv_width * live) * itemsize)


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
