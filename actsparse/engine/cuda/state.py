"""The buffers of a decode: cache, position, tokens and one token's activations. They never move."""

from dataclasses import dataclass

import torch
from torch import Tensor

from actsparse.engine.cuda.layout import Weights
from actsparse.engine.cuda.operators import Angles, Best

NOT_FORCED = -1
SQUARES = 4096  # more blocks than any residual addition has


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeState:
    """keys, values: [layers, kv_heads, max_length, head_dim] in the weights' dtype; position: [1] int32, that of the
    token whose embedding is in `hidden`; tokens, forced: [max_length] int64, forced -1 where the model chooses.

    Activations, float32 (float64 for float64 weights): hidden [width], qkv [qkv_width], mix [query_width],
    halves [2 * neurons], neurons [neurons], logits [vocab]; angles and best as their types say; squares [any] adds up
    to the sum of hidden * hidden where a step keeps it.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    tokens: Tensor
    forced: Tensor
    hidden: Tensor
    squares: Tensor
    qkv: Tensor
    mix: Tensor
    halves: Tensor
    neurons: Tensor
    logits: Tensor
    angles: Angles
    best: Best

    @property
    def max_length(self) -> int:
        return self.tokens.numel()


def new_state(weights: Weights, max_length: int, candidates: int = 1) -> DecodeState:
    """Empty buffers for sequences of up to `max_length` tokens; `candidates`: blocks that share the head."""
    shape, device = weights.shape, weights.device
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32

    def vector(size: int) -> Tensor:
        return torch.zeros(size, dtype=exact, device=device)

    cache = (shape.layers, shape.kv_heads, max_length, shape.head_dim)
    angle = torch.arange(max_length, device=device, dtype=torch.float32)[:, None] * weights.inverse_frequencies
    return DecodeState(
        keys=torch.zeros(cache, dtype=weights.dtype, device=device),
        values=torch.zeros(cache, dtype=weights.dtype, device=device),
        position=torch.zeros(1, dtype=torch.int32, device=device),
        tokens=torch.zeros(max_length, dtype=torch.int64, device=device),
        forced=torch.full((max_length,), NOT_FORCED, dtype=torch.int64, device=device),
        hidden=vector(shape.width),
        squares=vector(SQUARES),
        qkv=vector(shape.qkv_width),
        mix=vector(shape.query_width),
        halves=vector(2 * shape.neurons),
        neurons=vector(shape.neurons),
        logits=vector(shape.vocab),
        angles=Angles(
            cosine=(angle.cos() * weights.rope_scale).to(exact), sine=(angle.sin() * weights.rope_scale).to(exact)
        ),
        best=Best(
            value=torch.zeros(candidates, device=device),
            row=torch.zeros(candidates, dtype=torch.int32, device=device),
        ),
    )


def start(state: DecodeState, weights: Weights, token: int, position: int) -> None:
    """Makes `token`, at `position`, the next token that a step processes."""
    state.position.fill_(position)
    state.tokens[position] = token
    set_hidden(state, weights.embedding[token])


def set_hidden(state: DecodeState, hidden: Tensor) -> None:
    """Makes `hidden` [width] the residual stream."""
    state.hidden.copy_(hidden)
    state.squares.zero_()
    state.squares[0] = state.hidden.square().sum()
