"""What every operator computes, in plain torch: their meaning in tests, and the path of machines without a compiler."""

import torch
from torch import Tensor
from torch.nn import functional as F

from actsparse.engine.cpu.ops import (
    ACTIVATIONS,
    Attend,
    Columns,
    Decide,
    Embed,
    Gated,
    Multiply,
    NeuronSparse,
    Next,
    Norm,
    Op,
    Rows,
    Top,
)

NAMES = {number: name for name, number in ACTIVATIONS.items()}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width] divided by the root mean square of its last axis, times weight [width]."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon) * weight


def activate(x: Tensor, activation: int) -> Tensor:
    """The activation function of a number in `ACTIVATIONS`."""
    match NAMES[activation]:
        case "silu":
            return F.silu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case _:
            return x


def run(op: Op) -> None:
    """Run one operator on its tensors."""
    match op:
        case Norm():
            _put(op.out, rms_norm(op.x, op.weight, op.epsilon) * op.scale, op.add)
        case Rows():
            _rows(op)
        case Gated():
            _gated(op)
        case NeuronSparse():
            _neuron_sparse(op)
        case Columns():
            _columns(op)
        case Top():
            _top(op)
        case Attend():
            _attend(op)
        case Embed():
            op.out.copy_(op.embedding[op.token].float() * op.scale)
        case Next():
            _next(op)
        case Multiply():
            _multiply(op)
        case Decide():
            _decide(op)


def _put(out: Tensor, value: Tensor, add: int) -> None:
    out.copy_(out + value if add else value)


def _rows(op: Rows) -> None:
    listed = slice(None) if op.index is None or op.count is None else op.index[: int(op.count)].long()
    y = op.x @ op.weight[listed].float().T
    y = (y if op.bias is None else y + op.bias[listed]) * op.scale
    y = op.softcap * torch.tanh(y / op.softcap) if op.softcap > 0 else y
    out = op.out[:, : op.rows]
    out[:, listed] = out[:, listed] + y if op.add else y


def _gated(op: Gated) -> None:
    listed = slice(None) if op.index is None or op.count is None else op.index[: int(op.count)].long()
    gate, up = op.gate[listed].float(), op.up[listed].float()
    g, u = op.x @ gate.T, op.x @ up.T
    if op.gate_bias is not None:
        g = g + op.gate_bias[listed]
    if op.up_bias is not None:
        u = u + op.up_bias[listed]
    a = activate(g, op.activation) * u
    if op.fill is not None:
        a = a - op.fill[listed]
    if op.mask is not None:
        a = torch.where(op.mask[:, listed] > 0, a, 0.0)
    op.out[:, : a.shape[1]] = a


def _neuron_sparse(op: NeuronSparse) -> None:
    first, second = op.x @ op.first.float().T, op.x @ op.second.float().T
    first = first if op.first_bias is None else first + op.first_bias
    second = second if op.second_bias is None else second + op.second_bias
    if op.gate_first:
        first = activate(first, op.activation)
    else:
        second = activate(second, op.activation)
    keep = first.abs() >= op.threshold
    a = first * second
    op.out.copy_(torch.where(keep, a if op.fill is None else a - op.fill, 0.0))
    op.read.add_(keep.any(dim=0).sum())


def _columns(op: Columns) -> None:
    count = op.inputs if op.count is None else int(op.count)
    value = op.x[:, :count]
    size = value.abs() if op.score is None else value.abs() * op.score
    if op.keep:
        keep = value != 0
    elif 0 < op.top < count:
        order = size.sort(dim=1, descending=True, stable=True).indices[:, : op.top]
        keep = torch.zeros_like(value, dtype=torch.bool).scatter_(1, order, True)
    else:
        keep = ~(size < (0.0 if op.threshold is None or op.top else op.threshold))
    listed = slice(None) if op.index is None else op.index[:count].long()
    kept = value if op.fill is None else value - op.fill[listed]
    y = torch.where(keep, kept, 0.0) @ op.weight[listed].float()
    y = (y if op.base is None else y + op.base) * op.scale
    _put(op.out[:, : op.outputs], y, op.add)
    op.read.add_(keep.any(dim=0).sum())
    if op.dropped is not None:
        op.dropped[:, :count] = torch.where(keep, 0.0, value)


def _multiply(op: Multiply) -> None:
    gate, up = op.halves.chunk(2, dim=1)
    a = activate(gate, op.activation) * up
    a = a if op.fill is None else a - op.fill
    op.out.copy_(a if op.mask is None else torch.where(op.mask > 0, a, 0.0))


def _decide(op: Decide) -> None:
    op.mask.copy_(activate(op.value[:, : op.neurons], op.activation).abs() >= op.threshold)
    _list_union(op)


def _list_union(op: Top | Decide) -> None:
    union = op.mask.any(dim=0).nonzero().squeeze(1)
    op.index[: len(union)] = union.int()
    op.count.fill_(len(union))
    op.read.add_(len(union))


def _top(op: Top) -> None:
    order = op.score.sort(dim=1, descending=True, stable=True).indices
    op.mask.copy_(torch.zeros_like(op.mask) if op.always is None else op.always.expand_as(op.mask))
    for mask, units in zip(op.mask, order, strict=True):
        if op.sizes is None:
            best = units[: op.top]
        else:
            sizes = op.sizes[units]
            best = units[sizes.cumsum(0) - sizes < op.top]
        row = best if op.members is None else op.members[best].long().flatten()
        mask[row[row >= 0]] = 1
    _list_union(op)


def _turned(x: Tensor, norm: Tensor | None, op: Attend, place: Tensor) -> Tensor:
    """x [batch, heads, head_dim] normed and rotated at place [batch]."""
    if norm is not None:
        x = rms_norm(x, norm, op.epsilon)
    if op.cosine is None or op.sine is None:
        return x
    cosine, sine = op.cosine[place][:, None], op.sine[place][:, None]
    half = op.rotary // 2
    low, high, rest = x[..., :half], x[..., half : op.rotary], x[..., op.rotary :]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine, rest], dim=-1)


def _attend(op: Attend) -> None:
    at, place = int(op.position), op.position.long() - op.left
    parts = op.qkv.view(op.batch, -1, op.head_dim).split([op.heads, op.kv_heads, op.kv_heads], dim=1)
    op.keys[:, :, at] = _turned(parts[1], op.k_norm, op, place).to(op.keys.dtype)
    op.values[:, :, at] = parts[2].to(op.values.dtype)
    query = _turned(parts[0], op.q_norm, op, place).view(op.batch, op.kv_heads, -1, op.head_dim)
    keys, values = op.keys[:, :, : at + 1].float(), op.values[:, :, : at + 1].float()
    score = torch.einsum("bhgd,bhpd->bhgp", query, keys) * op.scale
    if op.softcap > 0:
        score = op.softcap * torch.tanh(score / op.softcap)
    positions = torch.arange(at + 1)
    seen = positions >= op.left[:, None]
    if op.window > 0:
        seen &= positions > at - op.window
    share = score.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    live = torch.where(seen[:, None, :, None], values, 0.0)
    mix = torch.einsum("bhgp,bhpd->bhgd", share, live)
    if op.active is not None:
        mix = torch.where(op.active[:, :, None, None] > 0, mix, 0.0)
    op.out.copy_(mix.reshape(op.batch, -1))


def _next(op: Next) -> None:
    following = min(int(op.position) + 1, op.length - 1)
    forced = op.forced[:, following]
    token = torch.where(forced >= 0, forced, op.logits.argmax(dim=-1))
    op.token.copy_(token)
    op.tokens[:, following] = token
    op.position.fill_(following)
