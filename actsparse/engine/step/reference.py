"""What every operator computes, in plain torch: the meaning of the kernels, and the path of machines without them.

Activations are one token of each sequence, [batch, width]; everything is computed in float32 (float64 for float64
inputs) and not rounded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged if it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width] divided by its root mean square, times weight [width]."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return x


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def project(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [outputs, inputs] times x [batch, inputs], plus bias: [batch, outputs]."""
    if torch.compiler.is_compiling():
        # A batch-1 product is one fused multiply and sum that reads the weight once in its own dtype; eager, the same
        # expression would write a float32 product as large as the weight. Larger batches are matrix products.
        one = x.shape[0] == 1
        y = (widen(weight) * widen(x)).sum(-1)[None] if one else widen(x.to(weight.dtype) @ weight.T)
    else:
        y = widen(x) @ widen(weight).T
    return y if bias is None else y + bias


def project_rows(weight_rows: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sums of x_i * weight_rows[i]: [batch, outputs]; weight_rows [inputs, outputs]."""
    if torch.compiler.is_compiling():
        if x.shape[0] == 1:
            y = (widen(weight_rows) * widen(x)[0, :, None]).sum(0)[None]
        else:
            y = widen(x.to(weight_rows.dtype) @ weight_rows)
    else:
        y = widen(x) @ widen(weight_rows)
    return y if bias is None else y + bias


def gated(gate_up: Tensor, x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """act(gate x) * (up x): [batch, neurons]; gate_up [2 * neurons, width] holds the gate rows first."""
    gate, up = project(gate_up, x, bias).chunk(2, dim=-1)
    return activate(gate, activation) * up


def keep_large(values: Tensor, threshold: Tensor) -> Tensor:
    """`values` where |value| >= threshold, zero elsewhere."""
    return torch.where(values.abs() >= threshold, values, 0.0)


def neuron_sparse(
    gate_up: Tensor,
    down_rows: Tensor,
    x: Tensor,
    threshold: Tensor,
    activation: str,
    first: str = "gate",
    bias: Tensor | None = None,
) -> Tensor:
    """The gated MLP with the neurons whose first value reaches the threshold: [batch, width].

    first="gate": kept where |act(gate x)| >= threshold (CATS, arXiv 2404.08763); first="up": where |up x| >= threshold
    (COUNTDOWN, arXiv 2505.17701). down_rows: [neurons, width]; threshold: one value or [neurons]; bias [2 * neurons].
    """
    gate, up = project(gate_up, x, bias).chunk(2, dim=-1)
    gate = activate(gate, activation)
    neurons = keep_large(gate, threshold) * up if first == "gate" else keep_large(up, threshold) * gate
    return project_rows(down_rows, neurons)


def input_sparse(
    weight_rows: Tensor, x: Tensor, threshold: Tensor, score: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """sum of x_i * weight_rows[i] over the inputs with |x_i| * score_i >= threshold: [batch, outputs].

    TEAL (arXiv 2408.14690) has score 1, WINA (arXiv 2505.19427) the norm of the weight's column. weight_rows:
    [inputs, outputs].
    """
    size = x.abs() if score is None else x.abs() * score
    return project_rows(weight_rows, torch.where(size >= threshold, widen(x), 0.0), bias)


def top_threshold(size: Tensor, top: int) -> Tensor:
    """[1]: halfway between the `top` largest of `size` [inputs] and the rest; of equals on both sides, all reach it."""
    best = size.topk(top + 1).values
    return (best[top - 1 : top] + best[top:]) / 2


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [batch, heads, head_dim], its first dimensions rotated by cosine and sine [batch, rotated / 2]."""
    half = cosine.shape[-1]
    low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine, rest], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """How one layer attends: what scores are multiplied by, capped at and limited to, and norms of queries and keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    epsilon: float = 0.0


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cosine: Tensor,
    sine: Tensor,
    how: Attention,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention of one token a sequence over the cache and itself: [batch, heads * head_dim]; the cache gains it.

    qkv: [batch, (heads + 2 * kv_heads) * head_dim]; keys, values: [batch, kv_heads, positions, head_dim], changed in
    place at `position` [1]; cosine, sine: [positions, rotated / 2]; padding [batch]: cached positions before a
    sequence's first token, which nothing sees and which do not count for rotation.
    """
    batch, kv_heads, positions, head_dim = keys.shape
    at = position.long()
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query, key, value = qkv.view(batch, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if how.q_norm is not None and how.k_norm is not None:
        query, key = rms_norm(query, how.q_norm, how.epsilon), rms_norm(key, how.k_norm, how.epsilon)
    turns = at.expand(batch) if padding is None else at - padding
    angles = cosine.index_select(0, turns), sine.index_select(0, turns)
    keys.index_copy_(2, at, rotate(key, *angles)[:, :, None].to(keys.dtype))
    values.index_copy_(2, at, value[:, :, None].to(values.dtype))
    query = rotate(query, *angles).view(batch, kv_heads, -1, head_dim)
    score = soft_cap(torch.einsum("bhgd,bhpd->bhgp", query, widen(keys)) * how.scale, how.softcap)
    place = torch.arange(positions, device=keys.device)[None]
    seen = place <= at
    if how.window is not None:
        seen = seen & (place > at - how.window)
    if padding is not None:
        seen = seen & (place >= padding[:, None])
    share = score.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    # Positions never written may hold anything: their share is zero, and zero times NaN is not.
    live = torch.where(seen[:, None, :, None], widen(values), 0.0)
    return torch.einsum("bhgp,bhpd->bhgd", share, live).reshape(batch, -1)
