"""Tiny random models of every family of the table, and a tokenizer of 120 words, all made in code."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 120
LAYERS = 2
HIDDEN = 32
FFN = 48
HEADS = 4
CONTEXT = 128
EXPERTS, TOP_K, SHARED = 5, 3, 40
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_PLAIN = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"head_dim": 8},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 16},
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gemma": _LLAMA | {"head_dim": 16},
    "gemma2": _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "olmo2": _LLAMA,
    "stablelm": _LLAMA,
    "cohere": _LLAMA,
    "phi3": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "qwen3_moe": _LLAMA | {
        "head_dim": 16, "moe_intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    },
    "olmoe": _LLAMA | {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "qwen2_moe": _LLAMA | {
        "moe_intermediate_size": FFN, "shared_expert_intermediate_size": SHARED, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    },
    "phi": _LLAMA,
    "nemotron": _LLAMA | {"head_dim": 8},
    "starcoder2": _LLAMA,
    "opt": {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": HIDDEN,
    },
    "gpt2": _GPT | {"n_inner": FFN},
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
        "intermediate_size": FFN, "attention_types": [[["global", "local"], 1]], "window_size": 16,
        "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": _PLAIN,
    "gptj": _GPT | {"n_inner": FFN, "rotary_dim": 4},
    "falcon": {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "ffn_hidden_size": FFN, "multi_query": False, "max_position_embeddings": CONTEXT,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "mpt": {
        "vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS,
        "max_seq_len": CONTEXT,
    },
}  # fmt: skip

WIDTHS = dict.fromkeys(CONFIGS, FFN) | {"bloom": 4 * HIDDEN, "mpt": 4 * HIDDEN}
"""Neurons of an MLP or of an expert, as the configurations above say."""

FFN_WIDTHS = {name: [width] for name, width in WIDTHS.items()} | {
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), [FFN] * EXPERTS),
    "qwen2_moe": [*[FFN] * EXPERTS, SHARED],
}
"""Neurons of every FFN of a layer: its MLP, or its experts and the shared one."""


def make_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a type with every weight and bias drawn, so that nothing is hidden behind zeros or ones."""
    config = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | IDS | changes))
    torch.manual_seed(seed)
    # sdpa leaves gemma2's soft caps out before transformers 5.23; the loader asks for eager attention too
    eager = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def tiny_model(model_type: str) -> PreTrainedModel:
    """The tiny model of a type, made once: leave it as you found it."""
    return make_model(model_type)


@cache
def make_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, `w0` to `w115`; its call puts <s> in front unless `bos` is False."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny(model_type: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny model and its tokenizer as a directory that `--model` takes."""
    make_model(model_type, seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int) -> str:
    """`count` random words of the tokenizer, one token each; the first ones are the likelier."""
    rng = random.Random(seed)
    return " ".join(f"w{min(int(rng.expovariate(0.03)), VOCAB - len(SPECIAL) - 1)}" for _ in range(count))


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without special tokens."""
    return torch.randint(len(SPECIAL), VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
