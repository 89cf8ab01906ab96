"""The table of model families: where each keeps its layers, projections and activation.

Adding a family is one row here and a tiny configuration in `tests/tiny.py`. Paths are dotted names from the model, the
layer, the attention or the MLP; an empty path is the object itself.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from actsparse.errors import ModelError

OWN_STEP = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text", "phi3"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: names of the parts of a decoder layer.

    `gate` is None in a non-gated FFN; `gate == up` means one fused projection whose output is [gate, up].
    `transposed` weights are stored [in, out] (GPT-2's Conv1D). In a mixture of experts `experts`, `router` and
    `shared` are the parts of the MLP that hold the experts' stacked weights, choose among them, and serve every token;
    a layer whose MLP has no such part is a dense one, described by the other fields, as the shared expert is.

    `attention_interface`: whether the attention goes through transformers' AttentionInterface, so that heads can be
    masked and KV policies applied; `static_cache`: whether the model's own step can be captured (it sets
    `_can_compile_fullgraph`).
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    mlp: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    transposed: bool = False
    experts: str | None = None
    router: str = "gate"
    shared: str | None = None
    attention_interface: bool = True
    static_cache: bool = True

    @property
    def fused_gate_up(self) -> bool:
        return self.gate == self.up

    @property
    def tier(self) -> int:
        """The engine that serves it: 1 a step of our own, 2 the model's own step with a static cache, 3 eager."""
        if self.experts is not None or not self.static_cache:
            return 3
        return 1 if self.model_type in OWN_STEP else 2


def _plain(model_type: str, **parts: str | tuple[str, ...] | bool | None) -> Family:
    """A non-gated family."""
    return Family(model_type=model_type, gate=None, **parts)  # pyright: ignore[reportArgumentType]


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        *(
            Family(model_type=name)
            for name in (
                "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text",
                "olmo2", "stablelm", "cohere",
            )
        ),
        *(
            Family(model_type=name, experts="experts")
            for name in ("mixtral", "qwen3_moe", "olmoe")
        ),
        Family(model_type="qwen2_moe", experts="experts", shared="shared_expert"),
        Family(model_type="phi3", qkv=("qkv_proj",), gate="gate_up_proj", up="gate_up_proj",
               activation="activation_fn"),
        _plain("phi", output="dense", up="fc1", down="fc2", activation="activation_fn"),
        _plain("nemotron"),
        _plain("starcoder2", up="c_fc", down="c_proj", activation="act"),
        _plain("opt", layers="model.decoder.layers", output="out_proj", mlp="", up="fc1", down="fc2",
               activation="activation_fn"),
        _plain("gpt2", layers="transformer.h", attention="attn", qkv=("c_attn",), output="c_proj", up="c_fc",
               down="c_proj", activation="act", transposed=True),
        _plain("gpt_neo", layers="transformer.h", attention="attn.attention", output="out_proj", up="c_fc",
               down="c_proj", activation="act", attention_interface=False, static_cache=False),
        _plain("gpt_neox", layers="gpt_neox.layers", attention="attention", qkv=("query_key_value",), output="dense",
               up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
        _plain("gptj", layers="transformer.h", attention="attn", output="out_proj", up="fc_in", down="fc_out",
               activation="act", attention_interface=False),
        _plain("falcon", layers="transformer.h", attention="self_attention", qkv=("query_key_value",), output="dense",
               up="dense_h_to_4h", down="dense_4h_to_h", activation="act", attention_interface=False),
        _plain("bloom", layers="transformer.h", attention="self_attention", qkv=("query_key_value",), output="dense",
               up="dense_h_to_4h", down="dense_4h_to_h", activation="gelu_impl",
               attention_interface=False),
        _plain("mpt", layers="transformer.blocks", attention="attn", qkv=("Wqkv",), output="out_proj", mlp="ffn",
               activation="act", attention_interface=False, static_cache=False),
    )
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """The row of a model type; raises ModelError naming the nearest row, and how to bring one's own.

    A type that is no decoder gets no row to start from.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if _has_encoder(model_type):
        raise ModelError(
            f"model type '{model_type}' has an encoder: only decoders that continue a text are served",
            "choose a causal language model; `actsparse models` lists the families",
        )
    near = nearest_row(model_type)
    raise ModelError(
        f"model type '{model_type}' is not supported: no row of the family table describes it",
        f"a row to start from is '{near}': write `actsparse models {near} > row.toml`, correct it,"
        " and pass it with --family row.toml; `actsparse models` lists them all",
    )


def nearest_row(model_type: str) -> str:
    """The row to start from for a type that the table lacks: the one of the most alike name, or that of most models."""
    alike = get_close_matches(model_type, FAMILIES, n=1, cutoff=0.5)
    return alike[0] if alike else "mixtral" if "moe" in model_type else "llama"


def _has_encoder(model_type: str) -> bool:
    """Whether transformers knows the type as one that fills in masked words, or reads one text to write another."""
    from transformers.models.auto import modeling_auto as known

    names = (known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    return any(model_type in mapping for mapping in names)
