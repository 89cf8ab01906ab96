"""The decode step under a plan of any mix of gates, in torch: what it means, and its way on a GPU without our kernels.

Everything is computed and what a gate drops is left out, so it is exact and saves nothing. No decision is made on the
host, so the step can be captured.
"""

import torch
from torch import Tensor

from actsparse.engine.step import reference
from actsparse.engine.step.plans import DensePlan
from actsparse.engine.step.state import DecodeState
from actsparse.engine.step.torch_step import TorchStep, add_branch, mix_of
from actsparse.engine.step.weights import LayerWeights, Weights
from actsparse.engine.step.work import Channels, Chosen, Decided, GatePlan, LayerWork, Listed, Mlp, Routed, Scored
from actsparse.results import SiteKind

Seen = dict[tuple[SiteKind, int], Tensor]


class GateStep:
    """Called, it processes the tokens in `state` under `plan` and leaves the next ones there."""

    def __init__(
        self, weights: Weights, state: DecodeState, plan: GatePlan, *, sampled: bool = False, padded: bool = False
    ) -> None:
        self._weights = weights
        self._state = state
        self._plan = plan
        self._padding = state.padding if padded else None
        self._layers = [weights.layer(index) for index in range(weights.shape.layers)]
        self._ends = TorchStep(weights, state, DensePlan(), sampled=sampled, padded=padded)

    def __call__(self, live: int | None = None) -> None:
        """One step; `live` as in `TorchStep`."""
        hidden = self._state.hidden
        seen: Seen = {}
        for layer in range(self._weights.shape.layers):
            hidden = self.attention(layer, hidden, seen, live)
            hidden = self.mlp(layer, hidden, seen)
        self._ends.next_token(hidden)

    def attention(self, layer: int, hidden: Tensor, seen: Seen, live: int | None = None) -> Tensor:
        """hidden [batch, width] plus the attention of a layer; `seen`: the normed residuals that routers may read."""
        one, work, state, shape = self._layers[layer], self._plan.layers[layer], self._state, self._weights.shape
        x = reference.rms_norm(hidden, one.attn_norm, shape.norm_epsilon)
        seen[SiteKind.ATTN_IN, layer] = x
        groups = None if work.heads is None else chosen(work.heads.router, layer, seen, shape.kv_heads)
        weights = zip(("q", "k", "v"), one.qkv.split(shape.qkv_widths), strict=True)
        qkv = torch.cat([project(work, name, weight, x) for name, weight in weights], dim=-1)
        keys, values = state.keys[layer, :, :, :live], state.values[layer, :, :, :live]
        cache = (keys, values, state.position, state.angles[layer], self._padding)
        mix = mix_of(qkv if one.qkv_bias is None else qkv + one.qkv_bias, one, cache)
        if groups is not None:
            mix = (mix.view(len(mix), shape.kv_heads, -1) * groups[:, :, None]).flatten(1)
        branch = project(work, "o", one.out, mix)
        return add_branch(hidden, branch if one.out_bias is None else branch + one.out_bias, one.post_attn_norm, shape)

    def mlp(self, layer: int, hidden: Tensor, seen: Seen) -> Tensor:
        """hidden [batch, width] plus the MLP of a layer."""
        one, work, shape = self._layers[layer], self._plan.layers[layer], self._weights.shape
        x = reference.rms_norm(hidden, one.mlp_norm, shape.norm_epsilon)
        seen[SiteKind.MLP_IN, layer] = x
        mlp = work.mlp
        branch = self._whole(layer, one, work, x) if mlp is None else self._sparse(layer, one, work, mlp, seen)
        return add_branch(hidden, branch if one.down_bias is None else branch + one.down_bias, one.post_mlp_norm, shape)

    def _whole(self, layer: int, one: LayerWeights, work: LayerWork, x: Tensor) -> Tensor:
        gate, up = _halves(one, work, x)
        a = reference.activate(gate, self._weights.shape.activation) * up
        if self._plan.neurons is not None:
            self._plan.neurons[layer].copy_(a)
        return project(work, "down", one.down, a)

    def _sparse(self, layer: int, one: LayerWeights, work: LayerWork, mlp: Mlp, seen: Seen) -> Tensor:
        x = seen[SiteKind.MLP_IN, layer]
        if isinstance(mlp, Listed):
            gate, up = reference.project(mlp.gate, x, mlp.gate_bias), reference.project(mlp.up, x, mlp.up_bias)
        else:
            gate, up = _halves(one, work, x)
        gate = reference.activate(gate, self._weights.shape.activation)
        a = gate * up
        match mlp:
            case Listed():
                keep = listed(mlp)
            case Decided():
                keep = (gate if mlp.gate_first else up).abs() >= mlp.threshold
            case Scored():
                keep = kept(a, mlp.threshold, mlp.top, mlp.score)
            case Routed():
                keep = chosen(mlp.router, layer, seen, a.shape[1])
        y = reference.project_rows(mlp.down_rows, torch.where(keep, a if mlp.fill is None else a - mlp.fill, 0.0))
        return y if mlp.base is None else y + mlp.base


def _halves(one: LayerWeights, work: LayerWork, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [batch, neurons] of x [batch, width], each under its channel rule if it has one."""
    weights = zip(("gate", "up"), one.gate_up.chunk(2), strict=True)
    both = torch.cat([project(work, name, weight, x) for name, weight in weights], dim=-1)
    gate, up = (both if one.gate_up_bias is None else both + one.gate_up_bias).chunk(2, dim=-1)
    return gate, up


def project(work: LayerWork, name: str, weight: Tensor, x: Tensor) -> Tensor:
    """[batch, outputs]: one projection of x [batch, inputs], under its channel rule if it has one."""
    rule: Channels | None = work.channels.get(name)
    if rule is None:
        return reference.project(weight, x)
    z = x if rule.basis is None else reference.project(rule.basis, x)
    keep = kept(z, rule.threshold, rule.top, rule.score)
    y = reference.project_rows(rule.rows, torch.where(keep, z, 0.0))
    if rule.correction is None:
        return y
    outer, inner = rule.correction
    return y + reference.project(outer, reference.project(inner, torch.where(keep, 0.0, z)))


def kept(x: Tensor, threshold: Tensor | None, top: int, score: Tensor | None) -> Tensor:
    """[batch, units]: whether |x| * score reaches the threshold, or is among the `top` largest (first of equals)."""
    size = x.abs() if score is None else x.abs() * score
    if top:
        return _largest(size, min(top, size.shape[1]))
    return torch.ones_like(size, dtype=torch.bool) if threshold is None else size >= threshold


def listed(mlp: Listed) -> Tensor:
    """[1 or batch, rows]: the rows that a list keeps."""
    if mlp.mask is not None:
        return mlp.mask != 0
    rows, index = len(mlp.gate), mlp.index
    live = torch.arange(index.numel(), device=index.device) < mlp.count
    marked = torch.zeros(rows + 1, dtype=torch.bool, device=index.device)
    return marked.index_fill_(0, torch.where(live, index.long(), rows), True)[None, :rows]


def chosen(router: Chosen, layer: int, seen: Seen, neurons: int) -> Tensor:
    """[batch, neurons]: what a router of `layer` keeps."""
    x = seen[router.site, max(0, layer - router.ahead)]
    if router.first is not None:
        x = reference.project(router.first, x)
        x = torch.tanh(x) if router.tanh else x
    score = reference.project(router.second, x)
    if router.sizes is None:
        units = _largest(score, router.top)
    else:
        order = score.sort(dim=1, descending=True, stable=True).indices
        sizes = router.sizes.long()[order]
        units = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, sizes.cumsum(1) - sizes < router.top)
    if router.members is None:
        mask = units
    else:
        members = torch.where(router.members < 0, neurons, router.members.long()).flatten()
        each = router.members.shape[1]
        marked = torch.zeros(len(x), neurons + 1, dtype=torch.int32, device=x.device)
        mask = marked.index_add_(1, members, units.int().repeat_interleave(each, dim=1))[:, :neurons] > 0
    return mask if router.always is None else mask | (router.always != 0)


def _largest(score: Tensor, count: int) -> Tensor:
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
