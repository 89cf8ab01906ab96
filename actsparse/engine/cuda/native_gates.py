"""The compiled step under a plan of any mix of gates: kernels that skip rows, with choices among units made in torch.

A choice (top-k, a router's list) is a handful of small launches on the device between the kernels; it is captured too.
"""

import torch
from torch import Tensor

from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.native_step import NativeStep
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step import gate_step, reference
from actsparse.engine.step.plans import DensePlan, Selection
from actsparse.engine.step.sliced import list_kept
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import LayerWeights, Weights
from actsparse.engine.step.work import Channels, Chosen, Decided, GatePlan, Groups, Listed, Routed, Scored
from actsparse.results import SiteKind


class NativeGateStep(NativeStep):
    """Called, it processes the token in `state` under `plan` and leaves the next one there."""

    def __init__(
        self, weights: Weights, state: DecodeState, plan: GatePlan, operators: Operators, *, sampled: bool = False
    ) -> None:
        super().__init__(weights, state, DensePlan(), operators, sampled=sampled)
        self._gates = plan
        self._seen: gate_step.Seen = {}
        self._vectors: dict[tuple[str, int], Tensor] = {}
        self._routers = [self._reads(layer) for layer in range(weights.shape.layers)]

    def _reads(self, layer: int) -> set[SiteKind]:
        """The sites of a layer that routers, of it or the next one, read."""
        found = set()
        for index, work in enumerate(self._gates.layers):
            routers = [work.heads.router] if work.heads is not None else []
            routers += [work.mlp.router] if isinstance(work.mlp, Routed) else []
            found |= {one.site for one in routers if max(0, index - one.ahead) == layer}
        return found

    def _see(self, layer: int, site: SiteKind, weight: Tensor) -> None:
        if site in self._routers[layer]:
            with self._operators.aside():
                x = reference.rms_norm(self._state.hidden, weight, self._weights.shape.norm_epsilon)
                self._seen[site, layer] = x

    def attention(self, layer: int) -> None:
        """hidden += attention of layer `layer`."""
        work, one, state, operators = self._gates.layers[layer], self._layers[layer], self._state, self._operators
        shape = self._weights.shape
        self._see(layer, SiteKind.ATTN_IN, one.attn_norm)
        norm = Norm(one.attn_norm, shape.norm_epsilon)
        groups = None if work.heads is None else self._groups(layer, work.heads)
        self._projections(layer, ("q", "k", "v"), one.qkv, shape.qkv_widths, state.qkv, norm, one.qkv_bias)
        operators.attend(
            state.mix,
            state.qkv,
            state.keys[layer, 0],
            state.values[layer, 0],
            position=state.position,
            angles=state.angles[layer],
            how=one.attention,
            groups=groups,
        )
        if work.heads is not None:  # a masked group's heads gave zeros
            self._add_columns(state.mix, work.heads.out_rows, one.out_bias, one.post_attn_norm, skip_zeros=True)
        else:
            self._output(layer, "o", state.mix, one.out, one.out_bias, one.post_attn_norm)

    def mlp(self, layer: int) -> None:
        """hidden += MLP of layer `layer`."""
        work, one = self._gates.layers[layer], self._layers[layer]
        self._see(layer, SiteKind.MLP_IN, one.mlp_norm)
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
        state, shape, channels = self._state, self._weights.shape, self._gates.layers[layer].channels
        norm = self._norm(layer)
        if not channels.keys() & {"gate", "up"}:
            self._operators.gated(
                state.neurons, state.hidden, one.gate_up, norm=norm, activation=shape.activation, bias=one.gate_up_bias
            )
        else:
            widths = (shape.neurons, shape.neurons)
            self._projections(layer, ("gate", "up"), one.gate_up, widths, state.halves, norm, one.gate_up_bias)
            with self._operators.aside():
                gate, up = state.halves.chunk(2, dim=1)
                state.neurons.copy_(reference.activate(gate, shape.activation) * up)
        if self._gates.neurons is not None:
            with self._operators.aside():
                self._gates.neurons[layer].copy_(state.neurons)
        self._output(layer, "down", state.neurons, one.down, one.down_bias, one.post_mlp_norm)

    def _listed(self, layer: int, one: LayerWeights, mlp: Listed) -> None:
        shape, rows = self._weights.shape, len(mlp.gate)
        gate_up = mlp.gate.as_strided((2 * rows, shape.width), mlp.gate.stride(), mlp.gate.storage_offset())
        neurons = self._state.neurons[0, : mlp.index.numel()]
        self._operators.gated(
            neurons,
            self._state.hidden,
            gate_up,
            norm=self._norm(layer),
            activation=shape.activation,
            bias=self._joined(layer, mlp.gate_bias, mlp.up_bias),
            fill=mlp.fill,
            index=mlp.index,
            count=mlp.count,
        )
        bias = self._base(layer, one.down_bias, mlp.base)
        self._add_columns(neurons, mlp.down_rows, bias, one.post_mlp_norm, index=mlp.index, count=mlp.count)

    def _decided(self, layer: int, one: LayerWeights, mlp: Decided) -> None:
        state, shape, operators = self._state, self._weights.shape, self._operators
        halves, activation = one.gate_up.split(shape.neurons), shape.activation
        biases = (None, None) if one.gate_up_bias is None else one.gate_up_bias.split(shape.neurons)
        first, acts = (0, (activation, "identity")) if mlp.gate_first else (1, ("identity", activation))
        factor, norm = state.halves[0, : shape.neurons], self._norm(layer)
        operators.threshold(
            factor, state.hidden, halves[first], mlp.threshold, norm=norm, activation=acts[0], bias=biases[first]
        )
        second = 1 - first
        operators.kept(
            state.neurons,
            state.hidden,
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
            state.hidden,
            one.gate_up,
            norm=self._norm(layer),
            activation=shape.activation,
            bias=one.gate_up_bias,
        )
        threshold = self._threshold(f"neuron {layer}", state.neurons, mlp.threshold, mlp.top, mlp.score)
        self._add_columns(
            state.neurons,
            mlp.down_rows,
            self._base(layer, one.down_bias, mlp.base),
            one.post_mlp_norm,
            threshold=threshold,
            score=_row(mlp.score),
            fill=mlp.fill,
        )

    def _routed(self, layer: int, one: LayerWeights, mlp: Routed) -> None:
        shape = self._weights.shape
        gate, up = one.gate_up.split(shape.neurons)
        biases = (None, None) if one.gate_up_bias is None else one.gate_up_bias.split(shape.neurons)
        index = self._buffer("index", shape.neurons, torch.int32)
        count = self._buffer("count", 1, torch.int32)
        with self._operators.aside():
            keep = gate_step.chosen(mlp.router, layer, self._seen, shape.neurons)[0]
            list_kept(Selection(index=index[None], count=count), keep[None])
        known = Listed(
            gate=gate,
            up=up,
            down_rows=mlp.down_rows,
            index=index,
            count=count,
            gate_bias=biases[0],
            up_bias=biases[1],
            fill=mlp.fill,
            base=mlp.base,
        )
        self._listed(layer, one, known)

    def _groups(self, layer: int, heads: Groups) -> Tensor:
        groups = self._buffer("groups", self._weights.shape.kv_heads, torch.int32)
        with self._operators.aside():
            groups.copy_(gate_step.chosen(heads.router, layer, self._seen, groups.numel())[0])
        return groups

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
        state, channels = self._state, self._gates.layers[layer].channels
        if not any(name in channels for name in names):
            self._operators.project(out, state.hidden, weight, norm=norm, bias=bias)
            return
        start = 0
        for name, width in zip(names, widths, strict=True):
            part = slice(start, start + width)
            some = None if bias is None else bias[part]
            rule = channels.get(name)
            if rule is None:
                self._operators.project(out[0, part], state.hidden, weight[part], norm=norm, bias=some)
            else:
                self._by_rule(f"{name} {layer}", rule, state.hidden, out[0, part], norm=norm, bias=some)
            start += width

    def _by_rule(
        self, key: str, rule: Channels, x: Tensor, out: Tensor, *, norm: Norm | None, bias: Tensor | None
    ) -> None:
        """out = what a channel rule makes of x."""
        operators = self._operators
        if rule.basis is not None:
            z = self._buffer("rotated", x.numel(), self._state.hidden.dtype)
            operators.project(z, x, rule.basis, norm=norm)
            x, norm = z, None
        threshold = self._threshold(key, x, rule.threshold, rule.top, rule.score, norm)
        operators.columns(
            out, x, rule.rows, threshold=threshold, score=_row(rule.score), norm=norm, bias=bias, skip_zeros=True
        )
        if rule.correction is not None:
            outer, inner = rule.correction
            low, transposed = self._buffer("low", len(inner), self._state.hidden.dtype), self._transposed(key, inner)
            operators.columns(low, x, transposed, threshold=threshold, score=_row(rule.score), norm=norm, invert=True)
            operators.add(out, low, outer)

    def _output(
        self, layer: int, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, post_norm: Tensor | None
    ) -> None:
        """hidden += a projection of x, by its channel rule if it has one."""
        rule = self._gates.layers[layer].channels.get(name)
        if rule is None:
            self._add_rows(x, weight, bias, post_norm)
        elif rule.basis is None and rule.correction is None:
            threshold = self._threshold(f"{name} {layer}", x, rule.threshold, rule.top, rule.score)
            score = _row(rule.score)
            self._add_columns(x, rule.rows, bias, post_norm, threshold=threshold, score=score, skip_zeros=True)
        else:
            self._by_rule(f"{name} {layer}", rule, x, self._state.branch, norm=None, bias=bias)
            self._add_branch_of(post_norm)

    def _add_branch_of(self, post_norm: Tensor | None) -> None:
        if post_norm is not None:
            self._add_branch(post_norm)
            return
        with self._operators.aside():
            self._state.hidden.add_(self._state.branch, alpha=self._weights.shape.residual_scale)

    def _threshold(
        self,
        key: str,
        x: Tensor,
        threshold: Tensor | None,
        top: int,
        score: Tensor | None,
        norm: Norm | None = None,
    ) -> Tensor | None:
        """The threshold [1] of a rule; for the `top` largest, one between the last kept and the first dropped."""
        if not top or top >= x.numel():
            return threshold
        found = self._buffer(f"threshold {key}", 1, self._state.hidden.dtype)
        with self._operators.aside():
            size = x.reshape(1, -1) if norm is None else reference.rms_norm(x.reshape(1, -1), norm.weight, norm.epsilon)
            size = size.abs() if score is None else size.abs() * score
            best = size.topk(top + 1, dim=1).values[0]
            found.copy_((best[top - 1 : top] + best[top:]) / 2)
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
    routers = [work.mlp.router for work in plan.layers if isinstance(work.mlp, Routed)]
    routers += [work.heads.router for work in plan.layers if work.heads is not None]
    if any(_reads_elsewhere(router) for router in routers):
        return "a router reads a site that the step does not keep"
    return None


def _reads_elsewhere(router: Chosen) -> bool:
    return router.site not in (SiteKind.ATTN_IN, SiteKind.MLP_IN)
