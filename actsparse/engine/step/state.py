"""The buffers of a decode: cache, position, tokens and one token's activations. They never move."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actsparse.engine.step.reference import widen
from actsparse.engine.step.weights import Weights

NOT_FORCED = -1
SQUARES = 4096  # more blocks than any residual addition has


class Best(NamedTuple):
    """Every block's largest logit: value [batch, blocks] float32, row [batch, blocks] int32."""

    value: Tensor
    row: Tensor


class Angles(NamedTuple):
    """Rotary tables: cosine, sine [positions, rotated / 2], float32."""

    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeState:
    """keys, values: [layers, batch, kv_heads, max_length, head_dim] in the weights' dtype; position: [1] int32, that of
    the tokens whose embeddings are in `hidden`; padding: [batch] int64, cached positions before a sequence's first
    token; tokens, forced: [batch, max_length] int64, forced -1 where the model chooses; uniform: [batch, max_length],
    one random number a token for sampling, with temperature and top_p [1].

    Activations, float32 (float64 for float64 weights): hidden [batch, width], qkv [batch, qkv_width],
    mix [batch, query_width], branch [batch, width], halves [batch, 2 * neurons], neurons [batch, neurons],
    logits [batch, vocab]; squares [any] adds up to the sum of hidden * hidden where a step of batch 1 keeps it; best:
    one candidate a block. angles: each layer's tables.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    padding: Tensor
    tokens: Tensor
    forced: Tensor
    uniform: Tensor
    temperature: Tensor
    top_p: Tensor
    hidden: Tensor
    squares: Tensor
    qkv: Tensor
    mix: Tensor
    branch: Tensor
    halves: Tensor
    neurons: Tensor
    logits: Tensor
    angles: tuple[Angles, ...]
    best: Best

    @property
    def max_length(self) -> int:
        return self.tokens.shape[1]

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]


def new_state(weights: Weights, max_length: int, *, batch: int = 1, candidates: int = 1) -> DecodeState:
    """Empty buffers for `batch` sequences of up to `max_length` tokens; `candidates`: blocks that share the head."""
    shape, device = weights.shape, weights.device
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32

    def vectors(size: int) -> Tensor:
        return torch.zeros(batch, size, dtype=exact, device=device)

    cache = (shape.layers, batch, shape.kv_heads, max_length, shape.head_dim)
    cosine, sine = (table.to(device, exact).contiguous() for table in weights.rope.tables(max_length))
    tables = [Angles(cosine=one, sine=two) for one, two in zip(cosine, sine, strict=True)]
    return DecodeState(
        keys=torch.zeros(cache, dtype=weights.dtype, device=device),
        values=torch.zeros(cache, dtype=weights.dtype, device=device),
        position=torch.zeros(1, dtype=torch.int32, device=device),
        padding=torch.zeros(batch, dtype=torch.int64, device=device),
        tokens=torch.zeros(batch, max_length, dtype=torch.int64, device=device),
        forced=torch.full((batch, max_length), NOT_FORCED, dtype=torch.int64, device=device),
        uniform=torch.zeros(batch, max_length, device=device),
        temperature=torch.ones(1, device=device),
        top_p=torch.ones(1, device=device),
        hidden=vectors(shape.width),
        squares=torch.zeros(SQUARES, dtype=exact, device=device),
        qkv=vectors(shape.qkv_width),
        mix=vectors(shape.query_width),
        branch=vectors(shape.width),
        halves=vectors(2 * shape.neurons),
        neurons=vectors(shape.neurons),
        logits=vectors(shape.vocab),
        angles=tuple(tables[table] for table in weights.rope.of_layer),
        best=Best(
            value=torch.zeros(batch, candidates, device=device),
            row=torch.zeros(batch, candidates, dtype=torch.int32, device=device),
        ),
    )


def start(state: DecodeState, weights: Weights, tokens: Tensor, position: int) -> None:
    """Makes `tokens` [batch], at `position`, the next that a step processes."""
    state.position.fill_(position)
    state.tokens[:, position] = tokens
    set_hidden(state, embed(weights, tokens))


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """The residual stream that `tokens` [batch] start with: [batch, width]."""
    return widen(weights.embedding[tokens]) * weights.shape.embed_scale


def set_hidden(state: DecodeState, hidden: Tensor) -> None:
    """Makes `hidden` [batch, width] the residual stream."""
    state.hidden.copy_(hidden)
    state.squares.zero_()
    state.squares[0] = state.hidden.square().sum()
