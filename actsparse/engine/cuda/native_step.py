"""One decode step as a fixed sequence of compiled kernels: five a layer, no host decision between them.

Each kernel starts while the one before it ends and fills its rings with weights in the meantime. Activations stay in
float32, or in fixed point where several blocks add up. Norms, activation function, residual additions, rotation, cache
write and argmax live inside the products.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.cuda.row_products import Caps
from actsparse.engine.cuda.sums import new_sums, to_values
from actsparse.engine.step.counter import Counter
from actsparse.engine.step.plans import PROJECTIONS, IndexedPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.torch_step import drawn
from actsparse.engine.step.weights import Weights
from actsparse.results import Unit

Stage = Callable[[int], None]


class NativeStep:
    """Called, it processes the tokens in `state` under a plan over neurons and leaves the next ones there.

    `operators` are those of one sequence, or of a batch of the state's size. `padded`: sequences may start after
    position 0.
    """

    def __init__(
        self,
        weights: Weights,
        state: DecodeState,
        plan: Plan,
        operators: Operators,
        *,
        sampled: bool = False,
        padded: bool = False,
    ) -> None:
        self._weights = weights
        self._state = state
        self._plan = plan
        self._operators = operators
        self._sampled = sampled
        self._layers = [weights.layer(index) for index in range(weights.shape.layers)]
        self._read = torch.zeros(weights.shape.layers, len(PROJECTIONS), dtype=torch.int64, device=weights.device)
        self._padding = state.padding if padded else None
        self._hidden, self._qkv, self._halves, self._branch = state.hidden, state.qkv, state.halves, state.branch
        if weights.shape.post_norm:
            if state.batch > 1:  # whose products add up in fixed point
                self._branch = new_sums(state.batch, weights.shape.width, device=weights.device)
        elif self._sums_up or state.batch > 1:
            self._hidden = new_sums(state.batch, weights.shape.width, device=weights.device)

    @property
    def _sums_up(self) -> bool:
        """Whether blocks of sparse products add to the residual, which then is held in fixed point."""
        return isinstance(self._plan, SlicedPlan | IndexedPlan | NeuronPlan)

    @property
    def hidden(self) -> Tensor:
        """The residual [batch, width] in float32."""
        return _floats(self._hidden)

    @property
    def qkv(self) -> Tensor:
        """Queries, keys and values [batch, qkv_width] of the last layer in float32."""
        return _floats(self._qkv)

    @property
    def halves(self) -> Tensor:
        """What gate and up gave last, [batch, 2 * neurons] in float32."""
        return _floats(self._halves)

    @property
    def counters(self) -> list[Counter]:
        """What the plan's rules let the step read; nothing for plans that know it before the token."""
        if not isinstance(self._plan, NeuronPlan):
            return []
        neurons = self._weights.shape.neurons
        return [
            Counter(layer=layer, unit=Unit.NEURON.value, read=one[-1:], total=neurons)
            for layer, one in enumerate(self._read)
        ]

    @property
    def attention_stages(self) -> Mapping[str, Stage]:
        """The kernels of a layer's attention in their order."""
        return {"qkv": self._project_qkv, "attention": self._attend, "out": self._add_out}

    @property
    def mlp_stages(self) -> Mapping[str, Stage]:
        """The kernels of a layer's MLP in their order."""
        if isinstance(self._plan, NeuronPlan):
            return {"first half": self._first_half, "second half": self._second_half, "down": self._add_kept}
        return {"gate and up": self._gated, "down": self._add_down}

    def begin(self) -> None:
        """Takes the residual from `state`."""
        if self._hidden is not self._state.hidden:
            self._operators.fix(self._hidden, self._state.hidden)

    def __call__(self) -> None:
        with self._operators.chain():
            self.begin()
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
        for stage in self.attention_stages.values():
            stage(layer)

    def mlp(self, layer: int) -> None:
        """hidden += MLP of layer `layer` under the plan."""
        for stage in self.mlp_stages.values():
            stage(layer)

    def _project_qkv(self, layer: int) -> None:
        one = self._layers[layer]
        norm = Norm(one.attn_norm, self._weights.shape.norm_epsilon)
        self._operators.project(self._qkv, self._hidden, one.qkv, norm=norm, bias=one.qkv_bias)

    def _attend(self, layer: int) -> None:
        state = self._state
        self._operators.attend(
            state.mix,
            self._qkv,
            state.keys[layer],
            state.values[layer],
            position=state.position,
            angles=state.angles[layer],
            how=self._layers[layer].attention,
            padding=self._padding,
        )

    def _add_out(self, layer: int) -> None:
        one = self._layers[layer]
        self._add_rows(self._state.mix, one.out, one.out_bias, one.post_attn_norm)

    def _add_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Tensor | None) -> None:
        """hidden += what weight [width, inputs] makes of x, normed and scaled as the family does."""
        shape, operators = self._weights.shape, self._operators
        if post_norm is None:
            operators.add(self._hidden, x, weight, bias=bias, scale=shape.residual_scale)
        else:
            operators.project(self._branch, x, weight, bias=bias)
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
        fresh: bool = False,
        keeps_nan: bool = False,
        skip_zeros: bool = False,
        atomics: bool = False,
        read: Tensor | None = None,
    ) -> None:
        """The same with weights stored input-major, `rows` [inputs, width]; the other arguments are `columns`'."""
        shape, operators = self._weights.shape, self._operators
        plain = post_norm is None
        operators.columns(
            self._hidden if plain else self._branch,
            x,
            rows,
            epilogue=(Epilogue.ATOMIC_ADD if atomics else Epilogue.ADD) if plain else Epilogue.WRITE,
            skip_zeros=skip_zeros,
            keeps_nan=keeps_nan,
            threshold=threshold,
            score=score,
            up=up,
            activation=activation,
            bias=bias,
            fill=fill,
            index=index,
            count=count,
            fresh=fresh,
            scale=shape.residual_scale if plain else 1.0,
            read=read,
        )
        if post_norm is not None:
            self._add_branch(post_norm)

    def _add_branch(self, post_norm: Tensor) -> None:
        state, shape = self._state, self._weights.shape
        norm = Norm(post_norm, shape.norm_epsilon)
        self._operators.post_norm(state.hidden, self._branch, norm, squares=state.squares, scale=shape.residual_scale)

    def logits(self) -> None:
        """The logits of the residual, and every block's best."""
        weights, state, shape = self._weights, self._state, self._weights.shape
        norm = Norm(weights.final_norm, shape.norm_epsilon)
        caps = Caps(shape.logit_scale, shape.logit_softcap or 0.0)
        self._operators.head(state.logits, state.best, self._hidden, weights.head, norm=norm, caps=caps)

    def draw(self) -> None:
        """Puts a token drawn from the logits in place of the best."""
        state = self._state
        following = (state.position + 1).clamp(max=state.max_length - 1).long()
        state.best.row.copy_(drawn(state, following)[:, None].expand_as(state.best.row))

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

    def _norm(self, layer: int) -> Norm:
        return Norm(self._layers[layer].mlp_norm, self._weights.shape.norm_epsilon)

    def _neurons(self, layer: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where a layer's activations go, of which neurons, and how many of them are live."""
        neurons, plan = self._state.neurons, self._plan
        if isinstance(plan, SlicedPlan):
            return neurons[:, : plan.down.shape[1]], None, plan.selection.count[layer : layer + 1]
        if isinstance(plan, IndexedPlan):
            index = plan.selection.index[layer]
            return neurons[:, : index.numel()], index, plan.selection.count[layer : layer + 1]
        return neurons, None, None

    def _gated(self, layer: int) -> None:
        one, plan = self._layers[layer], self._plan
        gate_up, bias, mask = one.gate_up, one.gate_up_bias, None
        if isinstance(plan, SlicedPlan):
            gate_up, bias = plan.gate_up[layer], None if plan.gate_up_bias is None else plan.gate_up_bias[layer]
            mask = None if plan.mask is None else plan.mask[layer]
        neurons, index, count = self._neurons(layer)
        self._operators.gated(
            neurons,
            self._hidden,
            gate_up,
            norm=self._norm(layer),
            activation=self._weights.shape.activation,
            bias=bias,
            mask=mask,
            index=index,
            count=count,
        )

    def _add_down(self, layer: int) -> None:
        one, plan = self._layers[layer], self._plan
        neurons, index, count = self._neurons(layer)
        if isinstance(plan, SlicedPlan | IndexedPlan):
            rows = plan.down[layer] if isinstance(plan, SlicedPlan) else plan.down_rows[layer]
            self._add_columns(neurons, rows, one.down_bias, one.post_mlp_norm, index=index, count=count)
        else:
            self._add_rows(neurons, one.down, one.down_bias, one.post_mlp_norm)

    def _halves_of(self, layer: int, plan: NeuronPlan) -> list[tuple[Tensor, Tensor | None, str]]:
        """Weight, bias and activation of the half that decides, and of the other."""
        one, neurons = self._layers[layer], self._weights.shape.neurons
        biases = (None, None) if one.gate_up_bias is None else one.gate_up_bias.split(neurons)
        acts = (self._weights.shape.activation, "identity")
        both = list(zip(one.gate_up.split(neurons), biases, acts, strict=True))
        return both if plan.first == "gate" else both[::-1]

    def _first_half(self, layer: int) -> None:
        plan = self._neuron_plan
        weight, bias, activation = self._halves_of(layer, plan)[0]
        self._operators.threshold(
            self._halves[:, : self._weights.shape.neurons],
            self._hidden,
            weight,
            plan.threshold[layer],
            norm=self._norm(layer),
            activation=activation,
            bias=bias,
        )

    def _second_half(self, layer: int) -> None:
        plan = self._neuron_plan
        weight, bias, activation = self._halves_of(layer, plan)[1]
        self._operators.kept(
            self._state.neurons,
            self._hidden,
            weight,
            self._halves[:, : self._weights.shape.neurons],
            norm=self._norm(layer),
            activation=activation,
            bias=bias,
            read=self._read[layer, -1:],
        )

    def _add_kept(self, layer: int) -> None:
        one, rows = self._layers[layer], self._neuron_plan.down_rows[layer]
        self._add_columns(self._state.neurons, rows, one.down_bias, one.post_mlp_norm, skip_zeros=True)

    @property
    def _neuron_plan(self) -> NeuronPlan:
        assert isinstance(self._plan, NeuronPlan)
        return self._plan


def _floats(held: Tensor) -> Tensor:
    return to_values(held) if held.dtype == torch.int64 else held
