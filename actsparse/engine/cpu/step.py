"""One decode step as a list of operators: some seven a layer, and no host decision between them."""

import torch
from torch import Tensor

from actsparse.engine.cpu.emit import Choice, Counter, Emitter
from actsparse.engine.cpu.mlp import Branch, MlpBuilder
from actsparse.engine.cpu.ops import Attend, Embed, Next, Op, Top, bfloat
from actsparse.engine.cpu.projection import Projector
from actsparse.engine.cpu.routers import Routers
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.weights import LayerWeights, Weights
from actsparse.engine.step.work import GatePlan, Groups, LayerWork
from actsparse.results import SiteKind


class StepBuilder:
    """Builds the operators of one step over the buffers of `state`."""

    def __init__(self, weights: Weights, state: DecodeState, plan: GatePlan) -> None:
        self.weights = weights
        self.state = state
        self.plan = plan
        self.batch = state.batch
        self.emit = Emitter(weights.shape, state, records=plan.records)
        shape = weights.shape
        # what routers read: two buffers a site, since a lookahead reads the layer before
        sites = (SiteKind.ATTN_IN, SiteKind.MLP_IN)
        self._inputs = {kind: [self.emit.floats(shape.width) for _ in range(2)] for kind in sites}
        projector = Projector(self.emit, max(shape.neurons, shape.width, shape.query_width))
        self._project = projector.project
        self._routers = Routers(self.emit, self._inputs)
        self._mlps = MlpBuilder(shape, self.emit, projector, self._routers, state.halves)
        self._scores = torch.zeros(self.batch * shape.heads * state.max_length)
        self._token = torch.zeros(self.batch, dtype=torch.int64)

    @property
    def counters(self) -> list[Counter]:
        """What the operators will have read."""
        return self.emit.counters

    @property
    def choices(self) -> list[Choice]:
        """Where the rules of a plan that records leave what they chose."""
        return self.emit.choices

    def layers(self) -> list[Op]:
        """The operators from the residual stream to the logits."""
        for index, work in enumerate(self.plan.layers):
            layer = self.weights.layer(index)
            self._attention(index, layer, work)
            self._mlp(index, layer, work)
        shape, state = self.weights.shape, self.state
        normed = self._inputs[SiteKind.ATTN_IN][0]
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
        x = self._inputs[SiteKind.ATTN_IN][index % 2]
        self.emit.norm(state.hidden, layer.attn_norm, x)
        groups = None
        if work.heads is not None:
            groups = self._routers.choose(index, work.heads.router, shape.kv_heads, "kv_group")
        if not any(name in work.channels for name in ("q", "k", "v")):
            if work.heads is None or groups is None:
                self.emit.rows(layer.qkv, x, state.qkv, bias=layer.qkv_bias)
            else:
                self._queries(layer, x, work.heads, groups)
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
                active=None if groups is None else groups.mask,
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
        x = self._inputs[SiteKind.MLP_IN][index % 2]
        self.emit.norm(self.state.hidden, layer.mlp_norm, x)
        target, add = self._target(layer.post_mlp_norm)
        record = None if self.plan.neurons is None else self.plan.neurons[index]
        branch = Branch(index=index, layer=layer, work=work, x=x, target=target, add=add)
        self._mlps.emit(branch, record)
        self._post(layer.post_mlp_norm)

    def _queries(self, layer: LayerWeights, x: Tensor, heads: Groups, chosen: Top) -> None:
        """Keys and values whole; queries of the groups that any sequence keeps."""
        shape, state = self.weights.shape, self.state
        query, kv = slice(0, shape.query_width), slice(shape.query_width, None)
        bias = layer.qkv_bias
        self.emit.rows(layer.qkv[kv], x, state.qkv[:, kv], bias=None if bias is None else bias[kv])
        rows, count = self._routers.members(chosen, heads.query_rows)
        bias = None if bias is None else bias[query]
        self.emit.rows(layer.qkv[query], x, state.qkv[:, query], bias=bias, index=rows, count=count)

    def _target(self, post_norm: Tensor | None) -> tuple[Tensor, int]:
        """Where a branch's result goes: added to the residual, or into a buffer of its own to be normed first."""
        return (self.state.hidden, 1) if post_norm is None else (self.state.branch, 0)

    def _post(self, post_norm: Tensor | None) -> None:
        if post_norm is not None:
            scale = self.weights.shape.residual_scale
            self.emit.norm(self.state.branch, post_norm, self.state.hidden, scale=scale, add=1)
