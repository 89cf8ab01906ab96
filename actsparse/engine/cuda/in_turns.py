"""A batch by the compiled step of one sequence: weights are read once a sequence, which pays where few are kept."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from actsparse.engine.step.state import Best, DecodeState


class InTurns:
    """Called, it processes the tokens in `state`, a sequence after the other, and leaves the next ones there.

    `make` gives the step of one sequence of one state; `candidates`: how many blocks share its head.
    """

    def __init__(self, state: DecodeState, make: Callable[[DecodeState], Callable[[], None]], candidates: int) -> None:
        self._state = state
        self._alone: Sequence[DecodeState] = [alone(state, one, candidates) for one in range(state.batch)]
        self._steps = [make(one) for one in self._alone]

    def __call__(self) -> None:
        for one, step in zip(self._alone, self._steps, strict=True):
            one.position.copy_(self._state.position)
            one.squares[0] = one.hidden.square().sum()
            step()
        self._state.position.copy_(self._alone[-1].position)


def alone(state: DecodeState, index: int, candidates: int) -> DecodeState:
    """A sequence of `state` by itself: the same memory, but for the position and what only a step of one keeps."""
    own = slice(index, index + 1)
    device = state.position.device
    return replace(
        state,
        keys=state.keys[:, own],
        values=state.values[:, own],
        position=state.position.clone(),
        padding=state.padding[own],
        tokens=state.tokens[own],
        forced=state.forced[own],
        uniform=state.uniform[own],
        hidden=state.hidden[own],
        squares=torch.zeros_like(state.squares),
        qkv=state.qkv[own],
        mix=state.mix[own],
        branch=state.branch[own],
        halves=state.halves[own],
        neurons=state.neurons[own],
        logits=state.logits[own],
        best=Best(
            value=torch.zeros(1, candidates, device=device),
            row=torch.zeros(1, candidates, dtype=torch.int32, device=device),
        ),
    )
