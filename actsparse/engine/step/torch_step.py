"""The decode step in torch, around any `Products`: the meaning of the compiled step, and its fallback.

All layers share one compiled function a part, since their tensors differ in address only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import torch
from torch import Tensor

from actsparse.engine.step import reference
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan, SlicedPlan
from actsparse.engine.step.products import Products, TorchProducts
from actsparse.engine.step.sampling import draw
from actsparse.engine.step.shape import Shape
from actsparse.engine.step.state import Angles, DecodeState, embed, set_hidden
from actsparse.engine.step.weights import LayerWeights, Weights

# Turns batch-1 products into fused multiply-and-sum kernels; `max_autotune` alone does not.
COMPILE_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


class TorchStep:
    """Called, it processes the tokens in `state` under `plan` and leaves the next ones there.

    `sampled`: draw tokens instead of taking the best. `padded`: sequences may start after position 0, as in batches of
    unequal prompts.
    """

    def __init__(
        self,
        weights: Weights,
        state: DecodeState,
        plan: Plan,
        *,
        compiled: bool = False,
        products: Products | None = None,
        sampled: bool = False,
        padded: bool = False,
    ) -> None:
        self._weights = weights
        self._state = state
        self._plan = plan
        self._products = products or TorchProducts()
        self._sampled = sampled
        self._padding = state.padding if padded else None
        self._layers = [weights.layer(index) for index in range(weights.shape.layers)]

        def build(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function, options=COMPILE_OPTIONS, dynamic=False) if compiled else function

        self._attention = build(_attention)
        self._dense = build(_dense)
        self._sliced = build(_sliced)
        self._head = build(_head)

    def __call__(self, live: int | None = None) -> None:
        """One step; `live`: how many cached positions attention looks at, this token's among them.

        None is all of the cache, masked: what a captured step needs.
        """
        hidden = self._state.hidden
        for layer in range(self._weights.shape.layers):
            hidden = self.attention(layer, hidden, live)
            hidden = self.mlp(layer, hidden)
        self.next_token(hidden)

    def attention(self, layer: int, hidden: Tensor, live: int | None = None) -> Tensor:
        """hidden [batch, width] plus the attention of layer `layer`."""
        state, one, shape, products = self._state, self._layers[layer], self._weights.shape, self._products
        keys, values = state.keys[layer, :, :, :live], state.values[layer, :, :, :live]
        cache = (keys, values, state.position, state.angles[layer], self._padding)
        plan = self._plan
        if not isinstance(plan, InputPlan):
            return self._attention(hidden, one, cache, shape, products)
        x = reference.rms_norm(hidden, one.attn_norm, shape.norm_epsilon)
        parts = plan.weights.qkv[layer].split(shape.qkv_widths, dim=1)
        qkv = self._input_sparse(plan, parts, x, layer, 0, plan.scores.qkv if plan.scores else None)
        mix = mix_of(qkv if one.qkv_bias is None else qkv + one.qkv_bias, one, cache)
        rows = (plan.weights.out[layer],)
        branch = self._input_sparse(plan, rows, mix, layer, 3, plan.scores.out if plan.scores else None)
        return add_branch(hidden, branch if one.out_bias is None else branch + one.out_bias, one.post_attn_norm, shape)

    def mlp(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden [batch, width] plus the MLP of layer `layer` under the plan."""
        one, shape, products = self._layers[layer], self._weights.shape, self._products
        match self._plan:
            case DensePlan():
                return self._dense(hidden, one, shape, products)
            case SlicedPlan() as plan:
                bias = None if plan.gate_up_bias is None else plan.gate_up_bias[layer]
                kept = Kept(
                    plan.gate_up[layer], bias, plan.down[layer], None if plan.mask is None else plan.mask[layer]
                )
                return self._sliced(hidden, kept, one, shape, products)
            case IndexedPlan() | NeuronPlan() | InputPlan():
                x = reference.rms_norm(hidden, one.mlp_norm, shape.norm_epsilon)
                branch = self._sparse_mlp(self._plan, layer, x)
                if one.down_bias is not None:
                    branch = branch + one.down_bias
                return add_branch(hidden, branch, one.post_mlp_norm, shape)
            case _ as unknown:
                assert_never(unknown)

    def _sparse_mlp(self, plan: IndexedPlan | NeuronPlan | InputPlan, layer: int, x: Tensor) -> Tensor:
        """[batch, width]: the MLP of x [batch, width] without the bias of down."""
        one, activation, products = self._layers[layer], self._weights.shape.activation, self._products
        if isinstance(plan, IndexedPlan):
            index, count = plan.selection.index[layer], plan.selection.count[layer : layer + 1]
            rows = plan.down_rows[layer]
            return products.indexed_mlp(one.gate_up, rows, index, count, x, activation, one.gate_up_bias)
        if isinstance(plan, NeuronPlan):
            rows, threshold = plan.down_rows[layer], plan.threshold[layer]
            return products.neuron_sparse(one.gate_up, rows, x, threshold, activation, plan.first, one.gate_up_bias)
        halves = plan.weights.gate_up[layer].split(self._weights.shape.neurons, dim=1)
        both = self._input_sparse(plan, halves, x, layer, 4, plan.scores.gate_up if plan.scores else None)
        gate, up = (both if one.gate_up_bias is None else both + one.gate_up_bias).chunk(2, dim=-1)
        neurons = reference.activate(gate, activation) * up
        rows = (plan.weights.down[layer],)
        return self._input_sparse(plan, rows, neurons, layer, 6, plan.scores.down if plan.scores else None)

    def _input_sparse(
        self, plan: InputPlan, parts: tuple[Tensor, ...], x: Tensor, layer: int, first: int, scores: Tensor | None
    ) -> Tensor:
        """The products of neighbouring projections, from `PROJECTIONS[first]` on, side by side."""
        for i, top in enumerate(plan.tops[layer][first : first + len(parts)] if plan.tops else ()):
            if top:
                size = x.abs() if scores is None else x.abs() * scores[layer, i]
                plan.threshold[layer, first + i : first + i + 1] = reference.top_threshold(size[0], top)
        found = [
            self._products.input_sparse(
                part,
                x,
                plan.threshold[layer, first + i : first + i + 1],
                None if scores is None else scores[layer, i],
                None,
            )
            for i, part in enumerate(parts)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def next_token(self, hidden: Tensor) -> None:
        """Logits, the token (the best, drawn, or forced), and its embedding in the state."""
        weights, state = self._weights, self._state
        state.logits.copy_(self._head(hidden, weights.final_norm, weights.head, weights.shape, self._products))
        following = (state.position + 1).clamp(max=state.max_length - 1).long()
        chosen = drawn(state, following) if self._sampled else state.logits.argmax(-1)
        forced = state.forced[:, following]
        token = torch.where(forced >= 0, forced, chosen[:, None])
        state.tokens.index_copy_(1, following, token)
        set_hidden(state, embed(weights, token[:, 0]))
        state.position.copy_(following)


def drawn(state: DecodeState, following: Tensor) -> Tensor:
    """The token [batch] drawn from the state's logits for position `following` [1]."""
    return draw(state.logits, state.uniform[:, following][:, 0], state.temperature, state.top_p)


Cache = tuple[Tensor, Tensor, Tensor, Angles, Tensor | None]


def _attention(hidden: Tensor, one: LayerWeights, cache: Cache, shape: Shape, products: Products) -> Tensor:
    x = reference.rms_norm(hidden, one.attn_norm, shape.norm_epsilon)
    mix = mix_of(products.project(one.qkv, x, one.qkv_bias), one, cache)
    return add_branch(hidden, products.project(one.out, mix, one.out_bias), one.post_attn_norm, shape)


def mix_of(qkv: Tensor, one: LayerWeights, cache: Cache) -> Tensor:
    """[batch, query_width]: attention of qkv [batch, qkv_width] over keys, values, position, angles and padding."""
    keys, values, position, angles, padding = cache
    return reference.attend(qkv, keys, values, position, angles.cosine, angles.sine, one.attention, padding)


def _dense(hidden: Tensor, one: LayerWeights, shape: Shape, products: Products) -> Tensor:
    x = reference.rms_norm(hidden, one.mlp_norm, shape.norm_epsilon)
    neurons = products.gated(one.gate_up, x, shape.activation, one.gate_up_bias)
    return add_branch(hidden, products.project(one.down, neurons, one.down_bias), one.post_mlp_norm, shape)


class Kept(NamedTuple):
    """A layer's kept neurons: gate_up and its bias, down's rows, and what each sequence keeps of them."""

    gate_up: Tensor
    bias: Tensor | None
    rows: Tensor
    mask: Tensor | None


def _sliced(hidden: Tensor, kept: Kept, one: LayerWeights, shape: Shape, products: Products) -> Tensor:
    x = reference.rms_norm(hidden, one.mlp_norm, shape.norm_epsilon)
    neurons = products.gated(kept.gate_up, x, shape.activation, kept.bias)
    neurons = neurons if kept.mask is None else neurons * kept.mask
    return add_branch(hidden, products.project_rows(kept.rows, neurons, one.down_bias), one.post_mlp_norm, shape)


def add_branch(hidden: Tensor, branch: Tensor, post_norm: Tensor | None, shape: Shape) -> Tensor:
    """hidden plus what a branch found, normed and scaled as the family does."""
    if post_norm is not None:
        branch = reference.rms_norm(branch, post_norm, shape.norm_epsilon)
    return hidden + branch if shape.residual_scale == 1 else hidden + branch * shape.residual_scale


def _head(hidden: Tensor, norm: Tensor, head: Tensor, shape: Shape, products: Products) -> Tensor:
    logits = products.project(head, reference.rms_norm(hidden, norm, shape.norm_epsilon), None)
    return reference.soft_cap(logits * shape.logit_scale, shape.logit_softcap)
