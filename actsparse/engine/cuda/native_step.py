"""One decode step as a fixed sequence of compiled kernels: five a layer, no host decision between them.

Each kernel starts while the one before it ends and fills its registers with weights in the meantime. Activations stay
in float32; norms, activation function, residual additions, rotation, cache write and argmax live inside the products.
"""

from typing import assert_never

from torch import Tensor

from actsparse.engine.cuda.operators import Epilogue, Norm, Operators
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.torch_step import drawn
from actsparse.engine.step.weights import Weights


class NativeStep:
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(
        self, weights: Weights, state: DecodeState, plan: Plan, operators: Operators, *, sampled: bool = False
    ) -> None:
        self._weights = weights
        self._state = state
        self._plan = plan
        self._operators = operators
        self._sampled = sampled

    def __call__(self) -> None:
        with self._operators.chain():
            for layer in range(self._weights.shape.layers):
                self.attention(layer)
                self.mlp(layer)
            self.logits()
            if not self._sampled:
                self.token()
        if self._sampled:
            self.draw()
            self.token()

    def attention(self, layer: int) -> None:
        """hidden += attention of layer `layer`."""
        weights, state, operators = self._weights, self._state, self._operators
        norm = Norm(weights.attn_norm[layer], weights.shape.norm_epsilon)
        bias = None if weights.qkv_bias is None else weights.qkv_bias[layer]
        plan = self._plan if isinstance(self._plan, InputPlan) else None
        if plan is None:
            operators.project(state.qkv, state.hidden, weights.qkv[layer], norm=norm, bias=bias)
        else:
            shape = weights.shape
            operators.columns(
                state.qkv,
                state.hidden,
                plan.weights.qkv[layer],
                threshold=plan.threshold[layer, :3],
                segments=(shape.query_width, shape.kv_width, shape.kv_width),
                score=plan.scores.qkv[layer] if plan.scores else None,
                norm=norm,
                squares=self._squares(1 if layer == 0 else operators.column_blocks(shape.width, shape.neurons)),
                bias=bias,
            )
        operators.attend(
            state.mix,
            state.qkv,
            state.keys[layer, 0],
            state.values[layer, 0],
            position=state.position,
            angles=state.angles[layer],
        )
        if plan is None:
            operators.add(state.hidden, state.mix, weights.out[layer])
        else:
            operators.columns(
                state.hidden,
                state.mix,
                plan.weights.out[layer],
                epilogue=_residual(plan),
                threshold=plan.threshold[layer, 3:4],
                score=plan.scores.out[layer] if plan.scores else None,
                squares_out=self._squares(),
            )

    def mlp(self, layer: int) -> None:
        """hidden += MLP of layer `layer` under the plan."""
        match self._plan:
            case DensePlan():
                self._dense(layer)
            case SlicedPlan() as plan:
                self._sliced(layer, plan)
            case IndexedPlan() as plan:
                self._indexed(layer, plan)
            case NeuronPlan() as plan:
                self._neuron_sparse(layer, plan)
            case InputPlan() as plan:
                self._input_sparse(layer, plan)
            case _ as unknown:
                assert_never(unknown)

    def logits(self) -> None:
        """The logits of the residual, and every block's best."""
        weights, state = self._weights, self._state
        norm = Norm(weights.final_norm, weights.shape.norm_epsilon)
        self._operators.head(state.logits, state.best, state.hidden, weights.head, norm=norm)

    def draw(self) -> None:
        """Puts a token drawn from the logits in place of the best."""
        state = self._state
        following = (state.position + 1).clamp(max=state.max_length - 1).long()
        state.best.row.copy_(drawn(state, following).expand_as(state.best.row))

    def token(self) -> None:
        """The next token (the best, drawn, or forced), and its embedding in hidden."""
        state = self._state
        self._operators.token(
            state.hidden,
            state.best,
            self._weights.embedding,
            squares=state.squares,
            forced=state.forced,
            tokens=state.tokens,
            position=state.position,
        )

    def _squares(self, parts: int | None = None) -> Tensor | None:
        """The parts of the residual's sum of squares that the last addition left; atomics leave none."""
        if not isinstance(self._plan, InputPlan) or self._plan.fast_atomics:
            return None
        return self._state.squares[:parts]

    def _norm(self, layer: int) -> Norm:
        return Norm(self._weights.mlp_norm[layer], self._weights.shape.norm_epsilon)

    def _dense(self, layer: int) -> None:
        weights, state, operators = self._weights, self._state, self._operators
        operators.gated(
            state.neurons,
            state.hidden,
            weights.gate_up[layer],
            norm=self._norm(layer),
            activation=weights.shape.activation,
        )
        operators.add(state.hidden, state.neurons, weights.down[layer])

    def _sliced(self, layer: int, plan: SlicedPlan) -> None:
        state, operators = self._state, self._operators
        neurons, count = state.neurons[0, : plan.down.shape[1]], plan.selection.count[layer : layer + 1]
        operators.gated(
            neurons,
            state.hidden,
            plan.gate_up[layer],
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            count=count,
        )
        operators.columns(state.hidden, neurons, plan.down[layer], epilogue=Epilogue.ADD, count=count)

    def _indexed(self, layer: int, plan: IndexedPlan) -> None:
        state, operators = self._state, self._operators
        index, count = plan.selection.index[layer], plan.selection.count[layer : layer + 1]
        neurons = state.neurons[0, : index.numel()]
        operators.gated(
            neurons,
            state.hidden,
            self._weights.gate_up[layer],
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            index=index,
            count=count,
        )
        operators.columns(state.hidden, neurons, plan.down_rows[layer], epilogue=Epilogue.ADD, index=index, count=count)

    def _neuron_sparse(self, layer: int, plan: NeuronPlan) -> None:
        weights, state, operators = self._weights, self._state, self._operators
        neurons = weights.shape.neurons
        gate, up = weights.gate_up[layer, :neurons], weights.gate_up[layer, neurons:]
        activation = weights.shape.activation
        decides, follows = (gate, up) if plan.first == "gate" else (up, gate)
        first, second = (activation, "identity") if plan.first == "gate" else ("identity", activation)
        factor, norm = state.halves[0, :neurons], self._norm(layer)
        operators.threshold(factor, state.hidden, decides, plan.threshold[layer], norm=norm, activation=first)
        operators.kept(state.neurons, state.hidden, follows, factor, norm=norm, activation=second)
        operators.columns(state.hidden, state.neurons, plan.down_rows[layer], epilogue=Epilogue.ADD, skip_zeros=True)

    def _input_sparse(self, layer: int, plan: InputPlan) -> None:
        weights, state, operators = self._weights, self._state, self._operators
        neurons = weights.shape.neurons
        operators.columns(
            state.halves,
            state.hidden,
            plan.weights.gate_up[layer],
            threshold=plan.threshold[layer, 4:6],
            segments=(neurons, neurons),
            score=plan.scores.gate_up[layer] if plan.scores else None,
            norm=self._norm(layer),
            squares=self._squares(operators.column_blocks(weights.shape.width, weights.shape.query_width)),
        )
        operators.columns(
            state.hidden,
            state.halves[0, :neurons],
            plan.weights.down[layer],
            up=state.halves[0, neurons:],
            activation=weights.shape.activation,
            epilogue=_residual(plan),
            threshold=plan.threshold[layer, 6:7],
            score=plan.scores.down[layer] if plan.scores else None,
            squares_out=self._squares(),
        )


def _residual(plan: InputPlan) -> Epilogue:
    return Epilogue.ATOMIC_ADD if plan.fast_atomics else Epilogue.ADD
