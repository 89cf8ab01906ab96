"""The compiled step that skips input channels (TEAL, WINA): four sparse products a layer, around attention.

Blocks of all four share outputs: they add their parts up in fixed point, and sums that were used are zeroed by a kernel
that is sure to come later.
"""

from collections.abc import Mapping
from typing import assert_never

from torch import Tensor

from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.native_step import NativeStep, Stage
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.cuda.sums import new_sums
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import Weights


class NativeInputStep(NativeStep):
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(
        self, weights: Weights, state: DecodeState, plan: InputPlan, operators: Operators, *, sampled: bool = False
    ) -> None:
        self._inputs = plan
        super().__init__(weights, state, plan, operators, sampled=sampled)
        self._qkv = new_sums(weights.shape.qkv_width, weights.device)
        self._halves = new_sums(2 * weights.shape.neurons, weights.device)

    @property
    def _sums_up(self) -> bool:
        return not self._inputs.fast_atomics

    @property
    def mlp_stages(self) -> Mapping[str, Stage]:
        """The kernels of a layer's MLP in their order."""
        return {"gate and up": self._project_halves, "down": self._add_neurons}

    def _squares(self, *, first: bool = False) -> Tensor | None:
        """The residual's sum of squares where a kernel of one block has left it."""
        kept = self._hidden is self._state.hidden and (first or self._weights.shape.post_norm)
        return self._state.squares[:1] if kept else None

    def _project_qkv(self, layer: int) -> None:
        plan, one, shape = self._inputs, self._layers[layer], self._weights.shape
        self._operators.columns(
            self._qkv,
            self._hidden,
            plan.weights.qkv[layer],
            threshold=plan.threshold[layer, :3],
            segments=shape.qkv_widths,
            score=plan.scores.qkv[layer] if plan.scores else None,
            norm=Norm(one.attn_norm, shape.norm_epsilon),
            squares=self._squares(first=layer == 0),
            bias=one.qkv_bias,
            zero=self._halves,  # which the layer before has used
        )

    def _add_out(self, layer: int) -> None:
        plan, one = self._inputs, self._layers[layer]
        self._add_columns(
            self._state.mix,
            plan.weights.out[layer],
            one.out_bias,
            one.post_attn_norm,
            threshold=plan.threshold[layer, 3:4],
            score=plan.scores.out[layer] if plan.scores else None,
            atomics=plan.fast_atomics,
        )

    def _project_halves(self, layer: int) -> None:
        plan, neurons = self._inputs, self._weights.shape.neurons
        self._operators.columns(
            self._halves,
            self._hidden,
            plan.weights.gate_up[layer],
            threshold=plan.threshold[layer, 4:6],
            segments=(neurons, neurons),
            score=plan.scores.gate_up[layer] if plan.scores else None,
            norm=self._norm(layer),
            squares=self._squares(),
            bias=self._layers[layer].gate_up_bias,
            zero=self._qkv,  # which attention has used
        )

    def _add_neurons(self, layer: int) -> None:
        plan, one, shape = self._inputs, self._layers[layer], self._weights.shape
        gate, up = self._halves.split(shape.neurons)
        self._add_columns(
            gate,
            plan.weights.down[layer],
            one.down_bias,
            one.post_mlp_norm,
            up=up,
            activation=shape.activation,
            threshold=plan.threshold[layer, 6:7],
            score=plan.scores.down[layer] if plan.scores else None,
            atomics=plan.fast_atomics,
        )


def native_step(
    weights: Weights, state: DecodeState, plan: Plan, operators: Operators, *, sampled: bool = False
) -> NativeStep:
    """The compiled step of `plan`."""
    match plan:
        case InputPlan():
            return NativeInputStep(weights, state, plan, operators, sampled=sampled)
        case DensePlan() | SlicedPlan() | IndexedPlan() | NeuronPlan():
            return NativeStep(weights, state, plan, operators, sampled=sampled)
        case _ as unknown:
            assert_never(unknown)
