"""One decode step as a list of operators: some seven a layer, and no host decision between them."""

import torch
from torch import Tensor

from actsparse.engine.cpu.emit import Counter, Emitter
from actsparse.engine.cpu.ops import (
    ACTIVATIONS,
    Attend,
    Embed,
    Multiply,
    NeuronSparse,
    Next,
    Op,
    Top,
    bfloat,
)
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import LayerWeights, Weights
from actsparse.engine.step.work import Channels, Chosen, Decided, GatePlan, Groups, LayerWork, Listed, Routed, Scored
from actsparse.results import SiteKind


class StepBuilder:
    """Builds the operators of one step over the buffers of `state`."""

    def __init__(self, weights: Weights, state: DecodeState, plan: GatePlan) -> None:
        self.weights = weights
        self.state = state
        self.plan = plan
        self.batch = state.batch
        self.emit = Emitter(weights.shape, state)
        shape = weights.shape
        # what routers read: two buffers a site, since a lookahead reads the layer before
        self._inputs = {kind: [self.emit.floats(shape.width) for _ in range(2)] for kind in ("attn", "mlp")}
        widest = max(shape.neurons, shape.width, shape.query_width)
        self._dropped, self._rotated = self.emit.floats(widest), self.emit.floats(widest)
        self._scores = torch.zeros(self.batch * shape.heads * state.max_length)
        self._token = torch.zeros(self.batch, dtype=torch.int64)

    @property
    def counters(self) -> list[Counter]:
        """What the operators will have read."""
        return self.emit.counters

    def layers(self) -> list[Op]:
        """The operators from the residual stream to the logits."""
        for index, work in enumerate(self.plan.layers):
            layer = self.weights.layer(index)
            self._attention(index, layer, work)
            self._mlp(index, layer, work)
        shape, state = self.weights.shape, self.state
        normed = self._inputs["attn"][0]
        self.emit.norm(state.hidden, self.weights.final_norm, normed)
        self.emit.rows(
            self.weights.head, normed, state.logits, scale=shape.logit_scale, softcap=shape.logit_softcap or 0.0
        )
        return self.emit.ops

    def next_token(self) -> list[Op]:
        """The operators that choose the next token and start its residual stream."""
        state, shape = self.state, self.weights.shape
        return [
            Next(
                logits=state.logits,
                forced=state.forced,
                token=self._token,
                tokens=state.tokens,
                position=state.position,
                batch=self.batch,
                vocab=shape.vocab,
                length=state.max_length,
            ),
            Embed(
                embedding=self.weights.embedding,
                token=self._token,
                out=state.hidden,
                bfloat=bfloat(self.weights.embedding),
                batch=self.batch,
                width=shape.width,
                scale=shape.embed_scale,
            ),
        ]

    def _attention(self, index: int, layer: LayerWeights, work: LayerWork) -> None:
        shape, state = self.weights.shape, self.state
        x = self._inputs["attn"][index % 2]
        self.emit.norm(state.hidden, layer.attn_norm, x)
        active = self._heads(index, work.heads)
        if not any(name in work.channels for name in ("q", "k", "v")):
            if work.heads is None:
                self.emit.rows(layer.qkv, x, state.qkv, bias=layer.qkv_bias)
            else:
                self._queries(layer, x, work.heads)
        else:
            start = 0
            for name, width in zip(("q", "k", "v"), shape.qkv_widths, strict=True):
                part = slice(start, start + width)
                bias = None if layer.qkv_bias is None else layer.qkv_bias[part]
                self._project(index, name, work, layer.qkv[part], x, state.qkv[:, part], bias=bias)
                start += width
        attention, angles = layer.attention, state.angles[index]
        self.emit.ops.append(
            Attend(
                qkv=state.qkv,
                q_norm=attention.q_norm,
                k_norm=attention.k_norm,
                cosine=angles.cosine,
                sine=angles.sine,
                keys=state.keys[index],
                values=state.values[index],
                position=state.position,
                left=state.padding,
                active=active,
                out=state.mix,
                scores=self._scores,
                bfloat=bfloat(state.keys),
                batch=self.batch,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                length=state.max_length,
                rotary=2 * angles.cosine.shape[-1],
                window=attention.window or 0,
                scale=attention.scale,
                softcap=attention.softcap or 0.0,
                epsilon=attention.epsilon,
            )
        )
        target, add = self._target(layer.post_attn_norm)
        if work.heads is not None and "o" not in work.channels:
            # a closed group's heads gave zeros, and its rows of the output projection are skipped
            self.emit.columns(index, "o", work.heads.out_rows, state.mix, target, base=layer.out_bias, keep=1, add=add)
        else:
            self._project(index, "o", work, layer.out, state.mix, target, bias=layer.out_bias, add=add)
        self._post(layer.post_attn_norm)

    def _mlp(self, index: int, layer: LayerWeights, work: LayerWork) -> None:
        state = self.state
        x = self._inputs["mlp"][index % 2]
        self.emit.norm(state.hidden, layer.mlp_norm, x)
        target, add = self._target(layer.post_mlp_norm)
        self._branch(index, layer, work, x, target, add)
        self._post(layer.post_mlp_norm)

    def _branch(self, index: int, layer: LayerWeights, work: LayerWork, x: Tensor, target: Tensor, add: int) -> None:
        """The MLP of x [batch, width], into (or added to) target [batch, width]."""
        neurons = self.emit.compact(self.weights.shape.neurons)
        match work.mlp:
            case None if not work.channels.keys() & {"gate", "up"}:
                if self.plan.neurons is not None:
                    neurons = self.plan.neurons[index]
                self.emit.gated(layer, x, out=neurons)
                self._project(index, "down", work, layer.down, neurons, target, bias=layer.down_bias, add=add)
            case None:
                self._by_channels(index, layer, work, x, target, add)
            case Listed() as listed:
                self._listed(index, listed, layer, x, target, add)
            case Decided() as decided:
                self._decided(index, decided, layer, x, target, add)
            case Scored() as scored:
                # the rule decides on |a|; what is filled in stands in `base`, and is taken off what is kept
                self.emit.gated(layer, x, out=neurons)
                self.emit.columns(
                    index,
                    "neuron",
                    scored.down_rows,
                    neurons,
                    target,
                    base=_sum(layer.down_bias, scored.base),
                    score=scored.score,
                    threshold=scored.threshold,
                    top=scored.top,
                    fill=scored.fill,
                    add=add,
                )
            case Routed() as routed:
                self._routed(index, routed, layer, x, target, add)

    def _by_channels(
        self, index: int, layer: LayerWeights, work: LayerWork, x: Tensor, target: Tensor, add: int
    ) -> None:
        state, neurons = self.state, self.weights.shape.neurons
        halves = {"gate": slice(0, neurons), "up": slice(neurons, 2 * neurons)}
        for name, half in halves.items():
            bias = None if layer.gate_up_bias is None else layer.gate_up_bias[half]
            self._project(index, name, work, layer.gate_up[half], x, state.halves[:, half], bias=bias)
        self.emit.ops.append(
            Multiply(
                halves=state.halves,
                out=self.emit.compact(neurons),
                batch=self.batch,
                neurons=neurons,
                activation=ACTIVATIONS[self.weights.shape.activation],
            )
        )
        self._project(
            index,
            "down",
            work,
            layer.down,
            self.emit.compact(self.weights.shape.neurons),
            target,
            bias=layer.down_bias,
            add=add,
        )

    def _listed(self, index: int, mlp: Listed, layer: LayerWeights, x: Tensor, target: Tensor, add: int) -> None:
        self.emit.gated(
            layer, x, gate=mlp.gate, up=mlp.up, gate_bias=mlp.gate_bias, up_bias=mlp.up_bias,
            fill=mlp.fill, index=mlp.index, count=mlp.count, mask=mlp.mask,
        )  # fmt: skip
        self.emit.columns(
            index, "neuron", mlp.down_rows, self.emit.compact(len(mlp.gate)), target,
            base=_sum(layer.down_bias, mlp.base), index=mlp.index, count=mlp.count, keep=1, add=add,
        )  # fmt: skip

    def _decided(self, index: int, mlp: Decided, layer: LayerWeights, x: Tensor, target: Tensor, add: int) -> None:
        shape = self.weights.shape
        gate, up = layer.gate_up.chunk(2)
        biases = (None, None) if layer.gate_up_bias is None else layer.gate_up_bias.chunk(2)
        order = slice(None) if mlp.gate_first else slice(None, None, -1)
        (first, second), (first_bias, second_bias) = (gate, up)[order], biases[order]
        self.emit.ops.append(
            NeuronSparse(
                first=first,
                second=second,
                x=x,
                first_bias=first_bias,
                second_bias=second_bias,
                threshold=mlp.threshold,
                fill=mlp.fill,
                out=self.emit.compact(shape.neurons),
                read=self.emit.counter(index, "second", shape.neurons),
                bfloat=bfloat(first),
                batch=self.batch,
                rows=shape.neurons,
                width=shape.width,
                stride=first.stride(0),
                step=int(mlp.threshold.numel() > 1),
                activation=ACTIVATIONS[shape.activation],
                gate_first=int(mlp.gate_first),
            )
        )
        base = _sum(layer.down_bias, mlp.base)
        self.emit.columns(
            index,
            "neuron",
            mlp.down_rows,
            self.emit.compact(self.weights.shape.neurons),
            target,
            base=base,
            keep=1,
            add=add,
        )

    def _routed(self, index: int, mlp: Routed, layer: LayerWeights, x: Tensor, target: Tensor, add: int) -> None:
        neurons = self.weights.shape.neurons
        listed, count, mask = self._chosen(index, mlp.router, neurons, "router")
        gate, up = layer.gate_up.chunk(2)
        gate_bias, up_bias = (None, None) if layer.gate_up_bias is None else layer.gate_up_bias.chunk(2)
        known = Listed(
            gate=gate, up=up, down_rows=mlp.down_rows, index=listed, count=count, gate_bias=gate_bias, up_bias=up_bias,
            mask=mask if self.batch > 1 else None, fill=mlp.fill, base=mlp.base,
        )  # fmt: skip
        self._listed(index, known, layer, x, target, add)

    def _heads(self, index: int, heads: Groups | None) -> Tensor | None:
        """Chooses the KV groups of a layer: active [batch, kv_heads], or None where all are."""
        if heads is None:
            return None
        return self._chosen(index, heads.router, self.weights.shape.kv_heads, "kv_group")[2]

    def _queries(self, layer: LayerWeights, x: Tensor, heads: Groups) -> None:
        """Keys and values whole; queries of the groups that any sequence keeps."""
        shape, state = self.weights.shape, self.state
        kv = slice(shape.query_width, None)
        bias = layer.qkv_bias
        self.emit.rows(layer.qkv[kv], x, state.qkv[:, kv], bias=None if bias is None else bias[kv])
        top = next(op for op in reversed(self.emit.ops) if isinstance(op, Top))
        rows, count = torch.zeros(shape.query_width, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self.emit.ops.append(
            Top(
                score=top.score,
                members=heads.query_rows,
                index=rows,
                count=count,
                mask=torch.zeros(self.batch, shape.query_width, dtype=torch.uint8),
                read=torch.zeros(1, dtype=torch.int64),
                batch=self.batch,
                units=top.units,
                top=top.top,
                members_each=heads.query_rows.shape[1],
                neurons=shape.query_width,
            )
        )
        query = layer.qkv[: shape.query_width]
        bias = None if bias is None else bias[: shape.query_width]
        self.emit.rows(query, x, state.qkv[:, : shape.query_width], bias=bias, index=rows, count=count)

    def _chosen(self, index: int, router: Chosen, neurons: int, unit: str) -> tuple[Tensor, Tensor, Tensor]:
        """The operators of a router; its list, count and masks."""
        kind = "attn" if router.site is SiteKind.ATTN_IN else "mlp"
        x = self._inputs[kind][max(0, index - router.ahead) % 2]
        if router.first is not None:
            inner = self.emit.floats(len(router.first))
            self.emit.rows(router.first, x, inner, softcap=1.0 if router.tanh else 0.0)
            x = inner
        units = len(router.second)
        score = self.emit.floats(units)
        self.emit.rows(router.second, x, score)
        listed, count = torch.zeros(neurons, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        mask = torch.zeros(self.batch, neurons, dtype=torch.uint8)
        self.emit.ops.append(
            Top(
                score=score,
                members=router.members,
                sizes=router.sizes,
                always=router.always,
                index=listed,
                count=count,
                mask=mask,
                read=self.emit.counter(index, unit, neurons),
                batch=self.batch,
                units=units,
                top=router.top,
                members_each=1 if router.members is None else router.members.shape[1],
                neurons=neurons,
            )
        )
        return listed, count, mask

    def _project(
        self, index: int, name: str, work: LayerWork, weight: Tensor, x: Tensor, out: Tensor,
        *, bias: Tensor | None, add: int = 0,
    ) -> None:  # fmt: skip
        """One projection, by its channel rule if it has one."""
        rule: Channels | None = work.channels.get(name)
        if rule is None:
            self.emit.rows(weight, x, out, bias=bias, add=add)
            return
        if rule.basis is not None:
            rotated = self._rotated[:, : x.shape[1]] if self.batch == 1 else self.emit.floats(x.shape[1])
            self.emit.rows(rule.basis, x, rotated)
            x = rotated
        dropped = None
        if rule.correction is not None:
            dropped = self._dropped[:, : x.shape[1]] if self.batch == 1 else self.emit.floats(x.shape[1])
        self.emit.columns(
            index, name, rule.rows, x, out, base=bias, score=rule.score, threshold=rule.threshold, top=rule.top,
            dropped=dropped, add=add,
        )  # fmt: skip
        if rule.correction is not None and dropped is not None:
            outer, inner_rows = rule.correction
            inner = self.emit.floats(len(inner_rows))
            self.emit.rows(inner_rows, dropped, inner)
            scale = self.emit.scale(out)
            self.emit.rows(outer, inner, out, scale=scale, add=1)

    def _target(self, post_norm: Tensor | None) -> tuple[Tensor, int]:
        """Where a branch's result goes: added to the residual, or into a buffer of its own to be normed first."""
        return (self.state.hidden, 1) if post_norm is None else (self.state.branch, 0)

    def _post(self, post_norm: Tensor | None) -> None:
        if post_norm is not None:
            scale = self.weights.shape.residual_scale
            self.emit.norm(self.state.branch, post_norm, self.state.hidden, scale=scale, add=1)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two vectors of which either may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
