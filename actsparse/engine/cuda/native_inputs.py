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
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.plans import PROJECTIONS, DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import Weights


class NativeInputStep(NativeStep):
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(
        self,
        weights: Weights,
        state: DecodeState,
        plan: InputPlan,
        operators: Operators,
        *,
        sampled: bool = False,
        padded: bool = False,
    ) -> None:
        self._inputs = plan
        super().__init__(weights, state, plan, operators, sampled=sampled, padded=padded)
        self._qkv = new_sums(state.batch, weights.shape.qkv_width, device=weights.device)
        self._halves = new_sums(state.batch, 2 * weights.shape.neurons, device=weights.device)

    @property
    def _sums_up(self) -> bool:
        return not self._inputs.fast_atomics

    @property
    def counters(self) -> list[Counter]:
        """How many inputs of each projection were read."""
        shape = self._weights.shape
        inputs = dict.fromkeys(PROJECTIONS, shape.width) | {"o": shape.query_width, "down": shape.neurons}
        return [
            Counter(layer=layer, unit=unit, read=one[at : at + 1], total=total)
            for layer, one in enumerate(self._read)
            for at, (unit, total) in enumerate(inputs.items())
        ]

    @property
    def mlp_stages(self) -> Mapping[str, Stage]:
        """The kernels of a layer's MLP in their order."""
        return {"gate and up": self._project_halves, "down": self._add_neurons}

    def _squares(self, *, first: bool = False) -> Tensor | None:
        """The residual's sum of squares where a kernel of one block has left it."""
        alone = self._state.batch == 1
        kept = alone and self._hidden is self._state.hidden and (first or self._weights.shape.post_norm)
        return self._state.squares[:1] if kept else None

    def _by_number(self, layer: int, part: slice) -> bool:
        """Whether neighbouring projections keep a number of their inputs, among which no value is lost."""
        return self._inputs.tops is not None and any(self._inputs.tops[layer][part])

    def _threshold(
        self,
        layer: int,
        part: slice,
        x: Tensor,
        score: Tensor | None,
        *,
        norm: Norm | None = None,
        up: Tensor | None = None,
    ) -> Tensor:
        """The thresholds of neighbouring projections of x; set here, if the largest of x are to be kept."""
        plan = self._inputs
        threshold, tops = plan.threshold[layer, part], plan.tops[layer][part] if plan.tops else (0,)
        if any(tops):
            activation = self._weights.shape.activation
            self._operators.top(threshold, x, tops, norm=norm, score=score, up=up, activation=activation)
        return threshold

    def _project_qkv(self, layer: int) -> None:
        plan, one, shape = self._inputs, self._layers[layer], self._weights.shape
        norm, score = Norm(one.attn_norm, shape.norm_epsilon), plan.scores.qkv[layer] if plan.scores else None
        self._operators.columns(
            self._qkv,
            self._hidden,
            plan.weights.qkv[layer],
            threshold=self._threshold(layer, slice(0, 3), self._hidden, score, norm=norm),
            segments=shape.qkv_widths,
            score=score,
            norm=norm,
            keeps_nan=self._by_number(layer, slice(0, 3)),
            squares=self._squares(first=layer == 0),
            bias=one.qkv_bias,
            zero=self._halves,  # which the layer before has used
            read=self._read[layer, 0:3],
        )

    def _add_out(self, layer: int) -> None:
        plan, one, mix = self._inputs, self._layers[layer], self._state.mix
        score = plan.scores.out[layer] if plan.scores else None
        self._add_columns(
            mix,
            plan.weights.out[layer],
            one.out_bias,
            one.post_attn_norm,
            threshold=self._threshold(layer, slice(3, 4), mix, score),
            keeps_nan=self._by_number(layer, slice(3, 4)),
            score=score,
            atomics=plan.fast_atomics,
            read=self._read[layer, 3:4],
        )

    def _project_halves(self, layer: int) -> None:
        plan, neurons, norm = self._inputs, self._weights.shape.neurons, self._norm(layer)
        score = plan.scores.gate_up[layer] if plan.scores else None
        self._operators.columns(
            self._halves,
            self._hidden,
            plan.weights.gate_up[layer],
            threshold=self._threshold(layer, slice(4, 6), self._hidden, score, norm=norm),
            segments=(neurons, neurons),
            score=score,
            norm=norm,
            keeps_nan=self._by_number(layer, slice(4, 6)),
            squares=self._squares(),
            bias=self._layers[layer].gate_up_bias,
            zero=self._qkv,  # which attention has used
            read=self._read[layer, 4:6],
        )

    def _add_neurons(self, layer: int) -> None:
        plan, one, shape = self._inputs, self._layers[layer], self._weights.shape
        gate, up = self._halves.split(shape.neurons, dim=1)
        score = plan.scores.down[layer] if plan.scores else None
        self._add_columns(
            gate,
            plan.weights.down[layer],
            one.down_bias,
            one.post_mlp_norm,
            up=up,
            activation=shape.activation,
            threshold=self._threshold(layer, slice(6, 7), gate, score, up=up),
            keeps_nan=self._by_number(layer, slice(6, 7)),
            score=score,
            atomics=plan.fast_atomics,
            read=self._read[layer, 6:7],
        )


def native_step(
    weights: Weights,
    state: DecodeState,
    plan: Plan,
    operators: Operators,
    *,
    sampled: bool = False,
    padded: bool = False,
) -> NativeStep:
    """The compiled step of `plan`."""
    match plan:
        case InputPlan():
            return NativeInputStep(weights, state, plan, operators, sampled=sampled, padded=padded)
        case DensePlan() | SlicedPlan() | IndexedPlan() | NeuronPlan():
            return NativeStep(weights, state, plan, operators, sampled=sampled, padded=padded)
        case _ as unknown:
            assert_never(unknown)
