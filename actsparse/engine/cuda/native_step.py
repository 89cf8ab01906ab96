"""One decode step as a fixed sequence of compiled kernels: five a layer, no host decision between them.

Each kernel starts while the one before it ends and fills its registers with weights in the meantime. Activations stay
in float32; norms, activation function, residual additions, rotation, cache write and argmax live inside the products.
"""

from typing import assert_never

from torch import Tensor

from actsparse.engine.cuda.operators import Caps, Epilogue, Norm, Operators
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
        self._layers = [weights.layer(index) for index in range(weights.shape.layers)]

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
        shape, one = weights.shape, self._layers[layer]
        norm = Norm(one.attn_norm, shape.norm_epsilon)
        plan = self._plan if isinstance(self._plan, InputPlan) else None
        if plan is None:
            operators.project(state.qkv, state.hidden, one.qkv, norm=norm, bias=one.qkv_bias)
        else:
            operators.columns(
                state.qkv,
                state.hidden,
                plan.weights.qkv[layer],
                threshold=plan.threshold[layer, :3],
                segments=shape.qkv_widths,
                score=plan.scores.qkv[layer] if plan.scores else None,
                norm=norm,
                squares=self._squares(shape.neurons, first=layer == 0),
                bias=one.qkv_bias,
            )
        operators.attend(
            state.mix,
            state.qkv,
            state.keys[layer, 0],
            state.values[layer, 0],
            position=state.position,
            angles=state.angles[layer],
            how=one.attention,
        )
        if plan is None:
            self._add_rows(state.mix, one.out, one.out_bias, one.post_attn_norm)
        else:
            score = plan.scores.out[layer] if plan.scores else None
            threshold = plan.threshold[layer, 3:4]
            self._add_columns(
                state.mix,
                plan.weights.out[layer],
                one.out_bias,
                one.post_attn_norm,
                threshold=threshold,
                score=score,
                atomics=plan.fast_atomics,
                keeps_squares=True,
            )

    def _add_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Tensor | None) -> None:
        """hidden += what weight [width, inputs] makes of x, normed and scaled as the family does."""
        state, shape, operators = self._state, self._weights.shape, self._operators
        if post_norm is None:
            operators.add(state.hidden, x, weight, bias=bias, scale=shape.residual_scale)
        else:
            operators.project(state.branch, x, weight, bias=bias)
            self._add_branch(post_norm)

    def _add_columns(
        self,
        x: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        post_norm: Tensor | None,
        *,
        up: Tensor | None = None,
        activation: str = "identity",
        threshold: Tensor | None = None,
        score: Tensor | None = None,
        fill: Tensor | None = None,
        index: Tensor | None = None,
        count: Tensor | None = None,
        skip_zeros: bool = False,
        atomics: bool = False,
        keeps_squares: bool = False,
    ) -> None:
        """The same with weights stored input-major, `rows` [inputs, width]; the other arguments are `columns`'."""
        state, shape, operators = self._state, self._weights.shape, self._operators
        plain = post_norm is None
        operators.columns(
            state.hidden if plain else state.branch,
            x,
            rows,
            epilogue=(Epilogue.ATOMIC_ADD if atomics else Epilogue.ADD) if plain else Epilogue.WRITE,
            skip_zeros=skip_zeros,
            threshold=threshold,
            score=score,
            up=up,
            activation=activation,
            squares_out=state.squares if plain and keeps_squares and not atomics else None,
            bias=bias,
            fill=fill,
            index=index,
            count=count,
            scale=shape.residual_scale if plain else 1.0,
        )
        if post_norm is not None:
            self._add_branch(post_norm)

    def _add_branch(self, post_norm: Tensor) -> None:
        state, shape = self._state, self._weights.shape
        norm = Norm(post_norm, shape.norm_epsilon)
        self._operators.post_norm(state.hidden, state.branch, norm, squares=state.squares, scale=shape.residual_scale)

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
        weights, state, shape = self._weights, self._state, self._weights.shape
        norm = Norm(weights.final_norm, shape.norm_epsilon)
        caps = Caps(shape.logit_scale, shape.logit_softcap or 0.0)
        self._operators.head(state.logits, state.best, state.hidden, weights.head, norm=norm, caps=caps)

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
            embed_scale=self._weights.shape.embed_scale,
        )

    def _squares(self, inputs: int, *, first: bool = False) -> Tensor | None:
        """The parts of the residual's sum of squares that the last addition, of `inputs` inputs, left; atomics none."""
        plan, state, shape = self._plan, self._state, self._weights.shape
        if first or shape.post_norm:
            return state.squares[:1]
        if not isinstance(plan, InputPlan) or plan.fast_atomics:
            return None
        return state.squares[: self._operators.square_parts(shape.width, inputs)]

    def _norm(self, layer: int) -> Norm:
        return Norm(self._layers[layer].mlp_norm, self._weights.shape.norm_epsilon)

    def _dense(self, layer: int) -> None:
        state, one = self._state, self._layers[layer]
        self._operators.gated(
            state.neurons,
            state.hidden,
            one.gate_up,
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            bias=one.gate_up_bias,
        )
        self._add_rows(state.neurons, one.down, one.down_bias, one.post_mlp_norm)

    def _sliced(self, layer: int, plan: SlicedPlan) -> None:
        state, one = self._state, self._layers[layer]
        neurons, count = state.neurons[0, : plan.down.shape[1]], plan.selection.count[layer : layer + 1]
        self._operators.gated(
            neurons,
            state.hidden,
            plan.gate_up[layer],
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            bias=None if plan.gate_up_bias is None else plan.gate_up_bias[layer],
            count=count,
        )
        self._add_columns(neurons, plan.down[layer], one.down_bias, one.post_mlp_norm, count=count)

    def _indexed(self, layer: int, plan: IndexedPlan) -> None:
        state, one = self._state, self._layers[layer]
        index, count = plan.selection.index[layer], plan.selection.count[layer : layer + 1]
        neurons = state.neurons[0, : index.numel()]
        self._operators.gated(
            neurons,
            state.hidden,
            one.gate_up,
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            bias=one.gate_up_bias,
            index=index,
            count=count,
        )
        rows = plan.down_rows[layer]
        self._add_columns(neurons, rows, one.down_bias, one.post_mlp_norm, index=index, count=count)

    def _neuron_sparse(self, layer: int, plan: NeuronPlan) -> None:
        state, one, operators = self._state, self._layers[layer], self._operators
        neurons, activation = self._weights.shape.neurons, self._weights.shape.activation
        halves = one.gate_up.split(neurons)
        biases = (None, None) if one.gate_up_bias is None else one.gate_up_bias.split(neurons)
        order, acts = ((0, 1), (activation, "identity")) if plan.first == "gate" else ((1, 0), ("identity", activation))
        factor, norm = state.halves[0, :neurons], self._norm(layer)
        first, second = order
        operators.threshold(
            factor,
            state.hidden,
            halves[first],
            plan.threshold[layer],
            norm=norm,
            activation=acts[0],
            bias=biases[first],
        )
        operators.kept(
            state.neurons, state.hidden, halves[second], factor, norm=norm, activation=acts[1], bias=biases[second]
        )
        rows = plan.down_rows[layer]
        self._add_columns(state.neurons, rows, one.down_bias, one.post_mlp_norm, skip_zeros=True)

    def _input_sparse(self, layer: int, plan: InputPlan) -> None:
        state, one, operators = self._state, self._layers[layer], self._operators
        shape = self._weights.shape
        operators.columns(
            state.halves,
            state.hidden,
            plan.weights.gate_up[layer],
            threshold=plan.threshold[layer, 4:6],
            segments=(shape.neurons, shape.neurons),
            score=plan.scores.gate_up[layer] if plan.scores else None,
            norm=self._norm(layer),
            squares=self._squares(shape.query_width),
            bias=one.gate_up_bias,
        )
        self._add_columns(
            state.halves[0, : shape.neurons],
            plan.weights.down[layer],
            one.down_bias,
            one.post_mlp_norm,
            up=state.halves[0, shape.neurons :],
            activation=shape.activation,
            threshold=plan.threshold[layer, 6:7],
            score=plan.scores.down[layer] if plan.scores else None,
            atomics=plan.fast_atomics,
            keeps_squares=True,
        )
