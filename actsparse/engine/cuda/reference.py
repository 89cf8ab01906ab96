"""What every operator computes, in plain torch: the meaning of the kernels, and the path of machines without them.

Vectors are one token's activations; everything is computed in float32 (float64 for float64 inputs) and not rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged if it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [width] divided by its root mean square, times weight [width]."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean() + epsilon) * weight


def activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return x


def project(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [outputs, inputs] times x [inputs], plus bias: [outputs]."""
    # Compiled, a batch-1 product is one fused multiply and sum that reads the weight once in its own dtype; eager, the
    # same expression would write a float32 product as large as the weight.
    y = (widen(weight) * widen(x)).sum(-1) if torch.compiler.is_compiling() else widen(weight) @ widen(x)
    return y if bias is None else y + bias


def project_rows(weight_rows: Tensor, x: Tensor) -> Tensor:
    """The sum of x_i * weight_rows[i]: [outputs]; weight_rows [inputs, outputs]."""
    if torch.compiler.is_compiling():
        return (widen(weight_rows) * widen(x)[:, None]).sum(0)
    return widen(x) @ widen(weight_rows)


def gated(gate_up: Tensor, x: Tensor, activation: str) -> Tensor:
    """act(gate x) * (up x): [neurons]; gate_up [2 * neurons, width] holds the gate rows first."""
    gate, up = project(gate_up, x).chunk(2)
    return activate(gate, activation) * up


def keep_large(values: Tensor, threshold: Tensor) -> Tensor:
    """`values` where |value| >= threshold, zero elsewhere."""
    return torch.where(values.abs() >= threshold, values, 0.0)


def neuron_sparse(
    gate_up: Tensor, down_rows: Tensor, x: Tensor, threshold: Tensor, activation: str, first: str = "gate"
) -> Tensor:
    """The gated MLP with the neurons whose first value reaches the threshold: [width].

    first="gate": kept where |act(gate x)| >= threshold (CATS, arXiv 2404.08763); first="up": where |up x| >= threshold
    (COUNTDOWN, arXiv 2505.17701). down_rows: [neurons, width]; threshold: one value or [neurons].
    """
    gate, up = project(gate_up, x).chunk(2)
    gate = activate(gate, activation)
    neurons = keep_large(gate, threshold) * up if first == "gate" else keep_large(up, threshold) * gate
    return project_rows(down_rows, neurons)


def input_sparse(
    weight_rows: Tensor, x: Tensor, threshold: Tensor, score: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """sum of x_i * weight_rows[i] over the inputs with |x_i| * score_i >= threshold: [outputs].

    TEAL (arXiv 2408.14690) has score 1, WINA (arXiv 2505.19427) the norm of the weight's column. weight_rows:
    [inputs, outputs].
    """
    size = x.abs() if score is None else x.abs() * score
    y = project_rows(weight_rows, torch.where(size >= threshold, widen(x), 0.0))
    return y if bias is None else y + bias


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [heads, head_dim] rotated by one position's angles, cosine and sine [head_dim / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def attend(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Attention of one token over the cache and itself: [heads * head_dim]; the cache gains the token.

    qkv: [(heads + 2 * kv_heads) * head_dim]; keys, values: [kv_heads, positions, head_dim], changed in place at
    `position` [1]; cosine, sine: [positions, head_dim / 2].
    """
    kv_heads, positions, head_dim = keys.shape
    at = position.long()
    query, key, value = qkv.view(-1, head_dim).split([qkv.numel() // head_dim - 2 * kv_heads, kv_heads, kv_heads])
    angles = cosine.index_select(0, at), sine.index_select(0, at)
    keys.index_copy_(1, at, rotate(key, *angles)[:, None].to(keys.dtype))
    values.index_copy_(1, at, value[:, None].to(values.dtype))
    query = rotate(query, *angles).view(kv_heads, -1, head_dim)
    score = torch.einsum("hgd,hpd->hgp", query, widen(keys)) * head_dim**-0.5
    seen = torch.arange(positions, device=keys.device) <= at
    share = score.masked_fill(~seen, -torch.inf).softmax(-1)
    # Positions never written may hold anything: their share is zero, and zero times NaN is not.
    live = torch.where(seen[None, :, None], widen(values), 0.0)
    return torch.einsum("hgp,hpd->hgd", share, live).reshape(-1)
