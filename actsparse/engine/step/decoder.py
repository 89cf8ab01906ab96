"""The decoder: one model's weights and cache, steps of several plans side by side, and tokens out of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from actsparse.engine.step.counter import Counter
from actsparse.engine.step.gate_step import GateStep
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.plans import DensePlan, Plan
from actsparse.engine.step.products import Products
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.state import NOT_FORCED, DecodeState, new_state, start
from actsparse.engine.step.torch_step import TorchStep
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import GatePlan
from actsparse.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """A step ready to run again: `run(live)` processes the tokens in the state, `live` positions with theirs.

    `kind` says how: "graph", "eager".
    """

    run: Callable[[int], object]
    kind: str


class Engine(Protocol):
    """What turns a plan into steps on one device; `warnings` says which better path could not be taken and why."""

    @property
    def warnings(self) -> list[str]:
        """Grows as plans are tried."""
        ...

    @property
    def candidates(self) -> int:
        """How many blocks share the head: the candidates of `DecodeState.best`."""
        ...

    @property
    def counters(self) -> Mapping[int, Sequence[Counter]]:
        """What the step of a plan, by its identity, counts of what it reads; missing where it counts nothing."""
        ...

    def runner(
        self, weights: Weights, state: DecodeState, plan: Plan | GatePlan, *, sampled: bool, padded: bool
    ) -> Runner:
        """The step of `plan`, ready; whatever it tried out is undone."""
        ...

    def forget(self, plan: Plan | GatePlan) -> None:
        """Let go of what is held for the steps of `plan`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchEngine:
    """The step in eager torch around `products`; the meaning of every other engine."""

    products: Products | None = None
    warnings: list[str] = field(default_factory=list)
    candidates: int = 1
    counters: Mapping[int, Sequence[Counter]] = field(default_factory=dict)

    def runner(
        self, weights: Weights, state: DecodeState, plan: Plan | GatePlan, *, sampled: bool, padded: bool
    ) -> Runner:
        if isinstance(plan, GatePlan):
            return Runner(run=GateStep(weights, state, plan, sampled=sampled, padded=padded), kind="eager")
        step = TorchStep(weights, state, plan, products=self.products, sampled=sampled, padded=padded)
        return Runner(run=step, kind="eager")

    def forget(self, plan: Plan | GatePlan) -> None:
        """Nothing is held."""


class Decoder:
    """Decodes `batch` sequences of up to `max_length` tokens in step, greedily or by sampling.

    Steps of several plans share cache and position, so plans can be compared on the same stream of tokens.
    """

    def __init__(self, weights: Weights, *, max_length: int, batch: int = 1, engine: Engine | None = None) -> None:
        self.weights = weights
        self.engine: Engine = engine or TorchEngine()
        self.state: DecodeState = new_state(weights, max_length, batch=batch, candidates=self.engine.candidates)
        self._runners: dict[tuple[int, bool, bool], tuple[Plan | GatePlan, Runner]] = {}
        self._plan: Plan | GatePlan = DensePlan()
        self._position = 0
        self._sampled = False
        self._padded = False

    @classmethod
    def from_model(cls, model: Any, *, max_length: int, batch: int = 1, engine: Engine | None = None) -> "Decoder":
        """A decoder of a transformers model's weights, copied. Raises ModelError for what the step does not compute."""
        return cls(weights_from_model(model), max_length=max_length, batch=batch, engine=engine)

    @property
    def warnings(self) -> list[str]:
        """Which better path could not be taken, and why."""
        return self.engine.warnings

    @property
    def position(self) -> int:
        """The position of the next tokens to process: the cache holds that many."""
        return self._position

    @property
    def path(self) -> str:
        """How the current plan runs: "graph" or "eager"."""
        return self._runner().kind

    def load_prefill(self, cache: Any, next_tokens: Tensor, padding: Tensor | None = None) -> None:
        """Takes over a prefill from a transformers cache, and the tokens [batch] after it.

        padding [batch]: positions of padding in front of each sequence.
        """
        length = cache.get_seq_length()
        self._check_room(length, 1)
        switch = self.weights.rope.switch
        if switch is not None and length <= switch < self.state.max_length:
            self.warnings.append(
                f"past {switch} tokens this model's rotary angles change, and the prompt's cache keeps the old ones"
            )
        for layer, one in enumerate(cache.layers):
            # A layer with a sliding window holds the last positions only.
            begin = length - one.keys.shape[2]
            self.state.keys[layer, :, :, begin:length].copy_(one.keys)
            self.state.values[layer, :, :, begin:length].copy_(one.values)
        self._padded = padding is not None and bool(padding.any())
        self.state.padding.copy_(padding if padding is not None else torch.zeros_like(self.state.padding))
        self.start(next_tokens, length)

    def start(self, tokens: Tensor | int, position: int) -> None:
        """Continues with `tokens` ([batch], or one for all) at `position`; the cache before it stays as it is."""
        tokens = torch.as_tensor(tokens, device=self.state.tokens.device).expand(self.state.batch)
        start(self.state, self.weights, tokens, position)
        self._position = position

    def force(self, tokens: Tensor | None) -> None:
        """Teacher forcing: `tokens` [batch, n] (or [n], for all) follow the next ones; None frees the model again."""
        self.state.forced.fill_(NOT_FORCED)
        if tokens is not None:
            count = tokens.shape[-1]
            self._check_room(self._position, count)
            self.state.forced[:, self._position + 1 : self._position + 1 + count] = tokens

    def sample(self, sampling: Sampling | None) -> None:
        """Draw tokens from now on; None decodes greedily again."""
        self._sampled = sampling is not None
        if sampling is not None:
            state = self.state
            state.uniform.copy_(sampling.uniform(state.batch, state.max_length))
            state.temperature.fill_(sampling.temperature)
            state.top_p.fill_(sampling.top_p)

    def set_plan(self, plan: Plan | GatePlan) -> None:
        """Makes `plan` the one that `decode` runs, and its step ready where it is new.

        Refilling a plan's tensors needs no second call. Plans are told apart by identity.
        """
        self._plan = plan
        self._runner()

    def forget_plan(self, plan: Plan | GatePlan) -> None:
        """Drops the steps of `plan` and the decoder's hold on its buffers; another is to be set where it is at work."""
        if self._plan is plan:
            self._plan = DensePlan()
        self.engine.forget(plan)
        for key in [key for key in self._runners if key[0] == id(plan)]:
            del self._runners[key]

    def decode(self, count: int) -> Tensor:
        """The next `count` tokens [batch, count], int64 on the device; may return before the device is done."""
        self._check_room(self._position, count)
        runner = self._runner()
        for _ in range(count):
            self._position += 1
            runner.run(self._position)
        return self.state.tokens[:, self._position - count + 1 : self._position + 1].clone()

    def _runner(self) -> Runner:
        key = (id(self._plan), self._sampled, self._padded)
        if key not in self._runners:
            runner = self.engine.runner(
                self.weights, self.state, self._plan, sampled=self._sampled, padded=self._padded
            )
            self._runners[key] = (self._plan, runner)
        return self._runners[key][1]

    def _check_room(self, position: int, count: int) -> None:
        if position + count >= self.state.max_length:
            raise PlanError(
                f"{position} tokens and {count} more do not fit a cache of {self.state.max_length}",
                "make the decoder with a larger max_length",
            )
