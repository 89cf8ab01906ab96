"""The CUDA engine: compiled kernels where they can run, else the torch step compiled, else eager; all captured."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actsparse.engine.cuda.availability import batch_refusal, has_triton, native_refusal
from actsparse.engine.cuda.batch_products import BatchOperators
from actsparse.engine.cuda.fold import fold
from actsparse.engine.cuda.graph import capture
from actsparse.engine.cuda.in_turns import InTurns
from actsparse.engine.cuda.launcher import Tuning
from actsparse.engine.cuda.native_gates import NativeGateStep, refusal
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.cuda.native_step import NativeStep
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.decoder import Decoder, Runner
from actsparse.engine.step.gate_step import GateStep
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan
from actsparse.engine.step.products import Products, TorchProducts
from actsparse.engine.step.state import DecodeState, set_hidden
from actsparse.engine.step.torch_step import TorchStep
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import GatePlan
from actsparse.errors import is_out_of_memory

ANY_ORDER = (
    "fast atomics: sparse products add their parts in any order, so two runs of a plan may differ in their last"
    " bits, and in a token where two are nearly as likely"
)
ONE_ORDER = "fast atomics change nothing here: compiled kernels have them for thresholds on all inputs of one sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    position: Tensor
    hidden: Tensor
    tokens: Tensor


class CudaEngine:
    """Steps for weights on a CUDA device; `operators` is None where the compiled kernels cannot serve them.

    Plans that the kernels of a batch do not know, but those of one sequence do, decode a sequence after the other.
    `fast_atomics`: add partial sums in any order where kernels can.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        batch: int = 1,
        native: bool = True,
        compiled: bool = True,
        tuning: Tuning | None = None,
        fast_atomics: bool = False,
    ) -> None:
        self.warnings: list[str] = []
        self.counters: dict[int, list[Counter]] = {}
        self._fast_atomics = fast_atomics
        self.operators: Operators | None = None
        self._compiled = compiled
        refused = native_refusal(weights) if native else "it was not asked for"
        together = refused or batch_refusal(weights, batch)
        if together is None:
            make = BatchOperators(weights.device, batch, tuning) if batch > 1 else Operators(weights.device, tuning)
            self.operators = make
        self._in_turns = Operators(weights.device, tuning) if batch > 1 and refused is None else None
        self._refused = together if native else None

    @property
    def candidates(self) -> int:
        """How many blocks share the head."""
        return self.operators.blocks if self.operators else 1

    def runner(
        self, weights: Weights, state: DecodeState, plan: Plan | GatePlan, *, sampled: bool, padded: bool
    ) -> Runner:
        """The step of `plan`, captured in a graph where it can be."""
        asked = plan
        if isinstance(plan, GatePlan):
            folded = fold(plan, state.batch)
            if folded is None:
                return self._gates(weights, state, plan, sampled=sampled, padded=padded)
            plan = folded
        if self.operators is not None and (state.batch == 1 or not isinstance(plan, IndexedPlan)):
            plan = self._in_any_order(weights, state, plan)
            step = native_step(weights, state, plan, self.operators, sampled=sampled, padded=padded)
            runner = self._captured(step, state)
            for one in step.counters:
                one.read.zero_()  # what was tried out
            self.counters.setdefault(id(asked), []).extend(step.counters)
            return runner
        if self._fast_atomics and not isinstance(plan, DensePlan):
            self._say(ONE_ORDER)
        if isinstance(plan, NeuronPlan | InputPlan) and not has_triton():
            self._say("without compiled kernels and Triton this plan masks weights but reads them all")
        products = _products()
        if self._compiled:
            if self._refused is not None:
                arm = "dense" if isinstance(plan, DensePlan) else "sparse"
                self._say(f"{arm} decode runs through torch.compile: {self._refused}")
            step = TorchStep(weights, state, plan, compiled=True, products=products, sampled=sampled, padded=padded)
            try:
                return self._captured(step, state)
            except Exception as error:  # torch.compile fails in many ways, and each has the same way out but one
                if is_out_of_memory(error):
                    raise
                self.warnings.append(f"decode runs uncompiled: {type(error).__name__}: {error}")
        step = TorchStep(weights, state, plan, products=products, sampled=sampled, padded=padded)
        return self._captured(step, state)

    def forget(self, plan: Plan | GatePlan) -> None:
        """Let go of what is held for the steps of `plan`."""
        self.counters.pop(id(plan), None)

    def _in_any_order(self, weights: Weights, state: DecodeState, plan: Plan) -> Plan:
        """`plan` with atomics, where these were asked for and its kernels have them."""
        if not self._fast_atomics or isinstance(plan, DensePlan):
            return plan
        if isinstance(plan, InputPlan) and state.batch == 1 and not weights.shape.post_norm:
            self._say(ANY_ORDER)
            return replace(plan, fast_atomics=True)
        self._say(ONE_ORDER)
        return plan

    def _say(self, text: str) -> None:
        """Warn of it, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def _gates(self, weights: Weights, state: DecodeState, plan: GatePlan, *, sampled: bool, padded: bool) -> Runner:
        """The step of a plan of any mix of gates."""
        operators = self.operators if state.batch == 1 else self._in_turns
        alone = fold(plan) if state.batch > 1 else None  # one sequence may have a simpler step
        refused = self._refused if operators is None else None if alone else refusal(plan, weights)
        if state.batch > 1 and plan.neurons is not None:
            refused = "its statistic sees the batch at once"
        if self._fast_atomics:
            self._say(ONE_ORDER)
        if operators is None or refused is not None:
            self._say(
                f"this plan masks weights but reads them all: {refused or 'there are no compiled kernels for it'}"
            )
            return self._captured(GateStep(weights, state, plan, sampled=sampled, padded=padded), state)

        def one(state: DecodeState) -> NativeStep:
            if alone is not None:
                return native_step(weights, state, alone, operators, sampled=sampled, padded=padded)
            return NativeGateStep(weights, state, plan, operators, sampled=sampled, padded=padded)

        if state.batch == 1:
            return self._captured(one(state), state)
        self._say(f"{state.batch} sequences decode in turns under this plan, each reading what it keeps")
        return self._captured(InTurns(state, one, operators.blocks), state)

    def _captured(self, step: NativeStep | InTurns | TorchStep | GateStep, state: DecodeState) -> Runner:
        """Captures `step` and undoes what its warm-ups did; the cache beyond the position is free to change."""
        before = _Snapshot(position=state.position.clone(), hidden=state.hidden.clone(), tokens=state.tokens.clone())
        captured = capture(step)
        state.position.copy_(before.position)
        set_hidden(state, before.hidden)
        state.tokens.copy_(before.tokens)
        if captured.warning:
            self._say(captured.warning)
        return Runner(run=lambda live: captured.run(), kind=captured.kind)


def _products() -> Products:
    if not has_triton():
        return TorchProducts()
    from actsparse.engine.cuda.triton_products import TritonProducts

    return TritonProducts()


def cuda_decoder(model: Any, *, max_length: int, batch: int = 1) -> Decoder:
    """A decoder of a transformers model on a CUDA device, its weights copied.

    Raises ModelError for what the step does not compute; the decoder's `warnings` say which better path was not taken.
    """
    weights = weights_from_model(model)
    return decoder_of(weights, max_length=max_length, batch=batch)


def decoder_of(
    weights: Weights, *, max_length: int, batch: int = 1, native: bool = True, tuning: Tuning | None = None
) -> Decoder:
    """A decoder of packed weights on a CUDA device; `native` False: without the compiled kernels."""
    with torch.cuda.device(weights.device):
        engine = CudaEngine(weights, batch=batch, native=native, tuning=tuning)
        return Decoder(weights, max_length=max_length, batch=batch, engine=engine)
