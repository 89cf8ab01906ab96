"""The compiled step under a plan of any mix of gates: kernels that skip rows, and between them those that choose."""

import torch
from torch import Tensor

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.native_routers import Routers, routers_of, why_not_chosen
from actsparse.engine.cuda.native_step import NativeStep
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step.plans import DensePlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import LayerWeights, Weights
from actsparse.engine.step.work import Channels, Decided, GatePlan, Listed, Routed, Scored
from actsparse.results import SiteKind


class NativeGateStep(NativeStep):
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(
        self,
        weights: Weights,
        state: DecodeState,
        plan: GatePlan,
        operators: Operators,
        *,
        sampled: bool = False,
        padded: bool = False,
    ) -> None:
        self._gates = plan
        super().__init__(weights, state, DensePlan(), operators, sampled=sampled, padded=padded)
        self._vectors: dict[tuple[str, int], Tensor] = {}
        self._routers = Routers(plan, weights, operators, exact=state.hidden.dtype)

    @property
    def _sums_up(self) -> bool:
        return True

    def attention(self, layer: int) -> None:
        """hidden += attention of layer `layer`."""
        work, one, state = self._gates.layers[layer], self._layers[layer], self._state
        shape = self._weights.shape
        norm = Norm(one.attn_norm, shape.norm_epsilon)
        self._routers.run(layer, SiteKind.ATTN_IN, self._hidden, norm)
        self._projections(layer, ("q", "k", "v"), one.qkv, shape.qkv_widths, state.qkv, norm, one.qkv_bias)
        self._operators.attend(
            state.mix,
            state.qkv,
            state.keys[layer],
            state.values[layer],
            position=state.position,
            angles=state.angles[layer],
            how=one.attention,
            groups=self._routers.groups.get(layer),
            padding=self._padding,
        )
        if work.heads is not None:  # a masked group's heads gave zeros
            self._add_columns(state.mix, work.heads.out_rows, one.out_bias, one.post_attn_norm, skip_zeros=True)
        else:
            self._output(layer, "o", state.mix, one.out, one.out_bias, one.post_attn_norm)

    def mlp(self, layer: int) -> None:
        """hidden += MLP of layer `layer`."""
        work, one = self._gates.layers[layer], self._layers[layer]
        self._routers.run(layer, SiteKind.MLP_IN, self._hidden, self._norm(layer))
        match work.mlp:
            case Listed() as mlp:
                self._listed(layer, one, mlp)
            case Decided() as mlp:
                self._decided(layer, one, mlp)
            case Scored() as mlp:
                self._scored(layer, one, mlp)
            case Routed() as mlp:
                self._routed(layer, one, mlp)
            case None:
                self._whole(layer, one)

    def _whole(self, layer: int, one: LayerWeights) -> None:
        state, shape, operators = self._state, self._weights.shape, self._operators
        norm, activation = self._norm(layer), shape.activation
        if self._gates.layers[layer].channels.keys() & {"gate", "up"}:
            widths = (shape.neurons, shape.neurons)
            self._projections(layer, ("gate", "up"), one.gate_up, widths, state.halves, norm, one.gate_up_bias)
            gate, up = state.halves[0].chunk(2)
            operators.merge(state.neurons, gate, up, activation)
        else:
            operators.gated(
                state.neurons, self._hidden, one.gate_up, norm=norm, activation=activation, bias=one.gate_up_bias
            )
        if self._gates.neurons is not None:
            with operators.aside():
                self._gates.neurons[layer].copy_(state.neurons)
        self._output(layer, "down", state.neurons, one.down, one.down_bias, one.post_mlp_norm)

    def _listed(self, layer: int, one: LayerWeights, mlp: Listed, *, fresh: bool = False) -> None:
        shape, rows = self._weights.shape, len(mlp.gate)
        gate_up = mlp.gate.as_strided((2 * rows, shape.width), mlp.gate.stride(), mlp.gate.storage_offset())
        neurons = self._state.neurons[0, : mlp.index.numel()]
        self._operators.gated(
            neurons,
            self._hidden,
            gate_up,
            norm=self._norm(layer),
            activation=shape.activation,
            bias=self._joined(layer, mlp.gate_bias, mlp.up_bias),
            fill=mlp.fill,
            index=mlp.index,
            count=mlp.count,
            fresh=fresh,
        )
        bias = self._base(layer, one.down_bias, mlp.base)
        self._add_columns(
            neurons, mlp.down_rows, bias, one.post_mlp_norm, index=mlp.index, count=mlp.count, fresh=fresh
        )

    def _decided(self, layer: int, one: LayerWeights, mlp: Decided) -> None:
        state, shape, operators = self._state, self._weights.shape, self._operators
        halves, activation = one.gate_up.split(shape.neurons), shape.activation
        biases = (None, None) if one.gate_up_bias is None else one.gate_up_bias.split(shape.neurons)
        first, acts = (0, (activation, "identity")) if mlp.gate_first else (1, ("identity", activation))
        factor, norm = state.halves[0, : shape.neurons], self._norm(layer)
        operators.threshold(
            factor, self._hidden, halves[first], mlp.threshold, norm=norm, activation=acts[0], bias=biases[first]
        )
        second = 1 - first
        operators.kept(
            state.neurons,
            self._hidden,
            halves[second],
            factor,
            norm=norm,
            activation=acts[1],
            bias=biases[second],
            fill=mlp.fill,
        )
        bias = self._base(layer, one.down_bias, mlp.base)
        self._add_columns(state.neurons, mlp.down_rows, bias, one.post_mlp_norm, skip_zeros=True)

    def _scored(self, layer: int, one: LayerWeights, mlp: Scored) -> None:
        state, shape = self._state, self._weights.shape
        self._operators.gated(
            state.neurons,
            self._hidden,
            one.gate_up,
            norm=self._norm(layer),
            activation=shape.activation,
            bias=one.gate_up_bias,
        )
        threshold = self._threshold(state.neurons, mlp.threshold, mlp.top, mlp.score)
        self._add_columns(
            state.neurons,
            mlp.down_rows,
            self._base(layer, one.down_bias, mlp.base),
            one.post_mlp_norm,
            threshold=threshold,
            score=_row(mlp.score),
            keeps_nan=mlp.top > 0,
            fill=mlp.fill,
        )

    def _routed(self, layer: int, one: LayerWeights, mlp: Routed) -> None:
        gate, up = one.gate_up.split(self._weights.shape.neurons)
        gate_bias, up_bias = (None, None) if one.gate_up_bias is None else one.gate_up_bias.chunk(2)
        kept = self._routers.neurons[layer]
        known = Listed(
            gate=gate,
            up=up,
            down_rows=mlp.down_rows,
            index=kept.index,
            count=kept.count,
            gate_bias=gate_bias,
            up_bias=up_bias,
            fill=mlp.fill,
            base=mlp.base,
        )
        self._listed(layer, one, known, fresh=True)

    def _projections(
        self,
        layer: int,
        names: tuple[str, ...],
        weight: Tensor,
        widths: tuple[int, ...],
        out: Tensor,
        norm: Norm,
        bias: Tensor | None,
    ) -> None:
        """Neighbouring projections of the normed residual, each by its channel rule if it has one."""
        channels = self._gates.layers[layer].channels
        if not any(name in channels for name in names):
            self._operators.project(out, self._hidden, weight, norm=norm, bias=bias)
            return
        start = 0
        for name, width in zip(names, widths, strict=True):
            part = slice(start, start + width)
            some = None if bias is None else bias[part]
            rule = channels.get(name)
            if rule is None:
                self._operators.project(out[0, part], self._hidden, weight[part], norm=norm, bias=some)
            else:
                self._by_rule(f"{name} {layer}", rule, self._hidden, out[0, part], norm=norm, bias=some)
            start += width

    def _by_rule(
        self,
        key: str,
        rule: Channels,
        x: Tensor,
        out: Tensor,
        *,
        norm: Norm | None = None,
        bias: Tensor | None = None,
        epilogue: Epilogue = Epilogue.WRITE,
        scale: float = 1.0,
    ) -> None:
        """out = what a channel rule makes of x, or out += scale times it."""
        operators, exact, score = self._operators, self._state.hidden.dtype, _row(rule.score)
        if rule.basis is not None:
            z = self._buffer("rotated", x.numel(), exact)
            operators.project(z, x, rule.basis, norm=norm)
            x, norm = z, None
        threshold = self._threshold(x, rule.threshold, rule.top, rule.score, norm)
        operators.columns(
            out,
            x,
            rule.rows,
            threshold=threshold,
            score=score,
            norm=norm,
            bias=bias,
            skip_zeros=True,
            keeps_nan=rule.top > 0,
            epilogue=epilogue,
            scale=scale,
        )
        if rule.correction is not None and threshold is not None:
            outer, inner = rule.correction
            low = self._buffer("low", len(inner), exact)
            rows = self._transposed(key, inner)
            operators.columns(
                low, x, rows, threshold=threshold, score=score, norm=norm, keeps_nan=rule.top > 0, invert=True
            )
            operators.add(out, low, outer, scale=scale)

    def _output(
        self, layer: int, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Tensor | None
    ) -> None:
        """hidden += a projection of x, by its channel rule if it has one."""
        rule, key = self._gates.layers[layer].channels.get(name), f"{name} {layer}"
        if rule is None:
            self._add_rows(x, weight, bias, post_norm)
        elif post_norm is None:
            scale = self._weights.shape.residual_scale
            self._by_rule(key, rule, x, self._hidden, bias=bias, epilogue=Epilogue.ADD, scale=scale)
        else:
            self._by_rule(key, rule, x, self._state.branch, bias=bias)
            self._add_branch(post_norm)

    def _threshold(
        self, x: Tensor, threshold: Tensor | None, top: int, score: Tensor | None, norm: Norm | None = None
    ) -> Tensor | None:
        """The threshold [1] of a rule; for the `top` largest, one between the last kept and the first dropped."""
        if not top or top >= x.numel():
            return threshold
        found = self._buffer("threshold", 1, self._state.hidden.dtype)
        self._operators.top(found, x, (top,), norm=norm, score=_row(score))
        return found

    def _joined(self, layer: int, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None or second is None:
            return None
        return self._vectors.setdefault(("bias", layer), torch.cat([first, second]))

    def _base(self, layer: int, bias: Tensor | None, base: Tensor | None) -> Tensor | None:
        if bias is None or base is None:
            return base if bias is None else bias
        return self._vectors.setdefault(("base", layer), bias + base)

    def _transposed(self, key: str, matrix: Tensor) -> Tensor:
        return self._vectors.setdefault((key, 0), matrix.T.contiguous())

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        if (name, size) not in self._vectors:
            self._vectors[name, size] = torch.zeros(size, dtype=dtype, device=self._weights.device)
        return self._vectors[name, size]


def _row(score: Tensor | None) -> Tensor | None:
    """Scores [inputs] as those of one segment."""
    return None if score is None else score[None]


def refusal(plan: GatePlan, weights: Weights) -> str | None:
    """Why the compiled step cannot run a plan, or None if it can."""
    for work in plan.layers:
        if isinstance(work.mlp, Listed):
            rows, itemsize = len(work.mlp.gate), work.mlp.gate.element_size()
            apart = work.mlp.up.data_ptr() - work.mlp.gate.data_ptr()
            if work.mlp.mask is not None or apart != rows * work.mlp.gate.stride(0) * itemsize:
                return "its lists of neurons are not over one matrix of gate and up"
        if work.mlp is not None and work.channels.keys() & {"gate", "up"}:
            return "a layer drops both neurons and channels of its MLP"
        for rule in work.channels.values():
            odd = rule.correction is not None and len(rule.correction[1]) % 8
            if odd or (rule.basis is not None and rule.basis.shape[1] % 8):
                return "a matrix that a channel rule brings has rows of no multiple of 16 bytes"
        for router in routers_of(work):
            if reason := why_not_chosen(router, weights.shape.neurons):
                return reason
    return None
