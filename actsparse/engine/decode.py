"""The decode loop of the model's own forward: prefill into a cache, then one token at a time, no sync inside."""

from collections.abc import Callable

import torch
import transformers
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

# Types whose forward says that it takes a static cache, and the first version of transformers in which it does.
STATIC_SINCE = {"bloom": "5.23"}


def takes_static_cache(model: PreTrainedModel) -> bool:
    """Whether the model's own forward decodes from a cache of fixed size."""
    since = STATIC_SINCE.get(model.config.model_type)
    declared = getattr(model, "_can_compile_fullgraph", False)
    return declared and (since is None or Version(transformers.__version__) >= Version(since))


def new_cache(model: PreTrainedModel, length: int) -> Cache:
    """A cache of fixed size where the model supports one, else a growing one."""
    if takes_static_cache(model):
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    cache: Cache,
    padding: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Run prompts dense into `cache`; the logits of their last position. `padding`: positions of it in front."""
    places = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
    mask = None
    if padding is not None and bool(padding.any()):
        places = places - padding[:, None]
        mask = (places >= 0).long()
        places = places.clamp(min=0)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@torch.no_grad()
def step(
    model: PreTrainedModel, token: Int[Tensor, "batch 1"], position: Int[Tensor, "batch 1"], cache: Cache
) -> Float[Tensor, "batch vocab"]:
    """Feed one token; the logits of the next."""
    output = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
    return output.logits[:, -1]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    logits: Float[Tensor, "batch vocab"],
    cache: Cache,
    start: int,
    tokens: int,
    stop: Callable[[Tensor], bool] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Greedy continuation of `tokens` tokens, the first read from `logits`; argmax stays on the device.

    `stop(token)` may end it early (this reads the token, so timing runs leave it out).
    """
    chosen = [logits.argmax(dim=-1, keepdim=True)]
    position = torch.full_like(chosen[0], start)
    while len(chosen) < tokens and not (stop and stop(chosen[-1])):
        chosen.append(step(model, chosen[-1], position, cache).argmax(dim=-1, keepdim=True))
        position = position + 1
    return torch.cat(chosen, dim=1)


@torch.no_grad()
def forced(
    model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"], cache: Cache, start: int
) -> Float[Tensor, "batch tokens vocab"]:
    """Feed given tokens one by one; the logits after each."""
    position = torch.full_like(tokens[:, :1], start)
    outputs = []
    for index in range(tokens.shape[1]):
        outputs.append(step(model, tokens[:, index : index + 1], position, cache))
        position = position + 1
    return torch.stack(outputs, dim=1)


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
