"""The decoder: one model's weights and cache, dense and sparse steps captured side by side, and tokens out of them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from actsparse.engine.cuda.availability import has_triton, native_refusal
from actsparse.engine.cuda.graph import Captured, capture
from actsparse.engine.cuda.input_sparse import InputPlan
from actsparse.engine.cuda.layout import Weights, weights_from_model
from actsparse.engine.cuda.neuron_sparse import NeuronPlan
from actsparse.engine.cuda.operators import Operators, Tuning
from actsparse.engine.cuda.state import NOT_FORCED, DecodeState, new_state, set_hidden, start
from actsparse.engine.cuda.step import DensePlan, NativeStep, Plan
from actsparse.engine.cuda.torch_step import TorchStep
from actsparse.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    position: Tensor
    hidden: Tensor
    tokens: Tensor


class Decoder:
    """Greedy batch-1 decode of up to `max_length` tokens.

    `warnings` says, in order, which better path could not be taken and why. Steps of several plans share cache and
    position, so plans can be compared on the same stream of tokens.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        max_length: int,
        native: bool = True,
        compiled: bool = True,
        tuning: Tuning | None = None,
    ) -> None:
        self.weights = weights
        self.warnings: list[str] = []
        self.operators: Operators | None = None
        if native:
            refusal = native_refusal(weights)
            if refusal is None:
                self.operators = Operators(weights.device, tuning)
            elif weights.gate_up.is_cuda:
                self.warnings.append(f"decode runs through torch.compile: {refusal}")
        self._compiled = compiled and weights.gate_up.is_cuda
        self.state: DecodeState = new_state(weights, max_length, self.operators.blocks if self.operators else 1)
        self._steps: dict[int, tuple[Plan, Captured]] = {}
        self._position = 0
        self._current: Captured | None = None
        self.set_plan(DensePlan())

    @classmethod
    def from_model(cls, model: Any, *, max_length: int) -> "Decoder":
        """A decoder of a transformers model's weights, copied. Raises ModelError for what the step does not compute."""
        return cls(weights_from_model(model, max_length=max_length), max_length=max_length)

    @property
    def position(self) -> int:
        """The position of the next token to process: the cache holds that many."""
        return self._position

    def load_cache(self, keys: list[Tensor], values: list[Tensor], next_token: int) -> None:
        """Takes over a prefill: keys and values per layer, [1, kv_heads, length, head_dim], and the token after it."""
        length = keys[0].shape[2]
        self._check_room(length, 1)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.state.keys[layer, :, :length].copy_(key[0])
            self.state.values[layer, :, :length].copy_(value[0])
        self.start(next_token, length)

    def start(self, token: int, position: int) -> None:
        """Continues with `token` at `position`; the cache before it stays as it is."""
        start(self.state, self.weights, token, position)
        self._position = position

    def force(self, tokens: Tensor | None) -> None:
        """Teacher forcing: `tokens` [n] follow the next token, whatever the model would choose; None frees it again."""
        self.state.forced.fill_(NOT_FORCED)
        if tokens is not None:
            self._check_room(self._position, len(tokens))
            self.state.forced[self._position + 1 : self._position + 1 + len(tokens)] = tokens

    def set_plan(self, plan: Plan) -> None:
        """Makes `plan` the one that `decode` runs, capturing its step the first time.

        Refilling a sequence-level plan's buffers needs no second call. Plans are told apart by identity.
        """
        known = self._steps.get(id(plan))
        if known is None:
            known = (plan, self._capture(plan))
            self._steps[id(plan)] = known
        self._current = known[1]

    def forget_plan(self, plan: Plan) -> None:
        """Drops the captured step of `plan` and the decoder's hold on its buffers."""
        self._steps.pop(id(plan), None)

    def decode(self, count: int) -> Tensor:
        """The next `count` tokens [count], int64 on the device; returns before the device is done."""
        self._check_room(self._position, count)
        for _ in range(count):
            self._step()
        begin = self._position + 1
        self._position += count
        return self.state.tokens[begin : begin + count].clone()

    def _step(self) -> None:
        if self._current is None:
            raise PlanError("no plan is set", "call set_plan first")
        self._current.run()

    @property
    def path(self) -> str:
        """How the current plan runs: "graph" or "eager"."""
        return self._current.kind if self._current else "none"

    def _check_room(self, position: int, count: int) -> None:
        if position + count >= self.state.max_length:
            raise PlanError(
                f"{position} tokens and {count} more do not fit a cache of {self.state.max_length}",
                "make the decoder with a larger max_length",
            )

    def _capture(self, plan: Plan) -> Captured:
        if self.operators is not None:
            step = NativeStep(self.weights, self.state, plan, self.operators)
            return self._announce(self._preserving(step))
        if isinstance(plan, NeuronPlan | InputPlan) and self.weights.gate_up.is_cuda and not has_triton():
            self.warnings.append("without compiled kernels and Triton this plan masks weights but reads them all")
        if self._compiled:
            try:
                return self._announce(self._preserving(self._torch_step(plan, compiled=True)))
            except Exception as error:  # torch.compile fails in many ways, and each has the same way out
                self.warnings.append(f"decode runs uncompiled: {type(error).__name__}: {error}")
        return self._announce(self._preserving(self._torch_step(plan, compiled=False)))

    def _torch_step(self, plan: Plan, *, compiled: bool) -> TorchStep:
        return TorchStep(self.weights, self.state, plan, compiled=compiled)

    def _preserving(self, step: NativeStep | TorchStep) -> Captured:
        """Captures `step` and undoes what its warm-ups did; the cache beyond the position is free to change."""
        state = self.state
        before = _Snapshot(position=state.position.clone(), hidden=state.hidden.clone(), tokens=state.tokens.clone())
        captured = capture(step) if self.weights.gate_up.is_cuda else Captured(step=step, run=step, kind="eager")
        state.position.copy_(before.position)
        set_hidden(state, before.hidden)
        state.tokens.copy_(before.tokens)
        return captured

    def _announce(self, captured: Captured) -> Captured:
        if captured.warning:
            self.warnings.append(captured.warning)
        return captured
