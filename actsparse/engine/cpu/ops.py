"""The operators of a decode step, as records of the tensors that they read and write; field order is the C++ struct's.

Activations are float32 [batch, width]; weights are float32 or bfloat16, one row an output (or, for `Columns`, one row
an input), `stride` apart. Sums are float32. `reference.py` says in torch what each computes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "gelu": 3, "identity": 4}
MAX_BATCH = 8
MAX_CHUNKS = 32
CHUNK_INPUTS = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """out = scale * x / rms(x) * weight, or out += that: x, out [batch, width]; weight [width] float32."""

    x: Tensor
    weight: Tensor
    out: Tensor
    batch: int
    width: int
    epsilon: float
    scale: float = 1.0
    add: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """out = scale * (weight x + bias), or out += that; with `softcap` c > 0, c * tanh(. / c).

    weight [rows, width]; x [batch, width]; bias [rows] float32; out [batch, .], rows `out_stride` apart, of which only
    those listed in index [rows] int32 up to count [1] int32 are written where there is a list.
    """

    weight: Tensor
    x: Tensor
    bias: Tensor | None = None
    index: Tensor | None = None
    count: Tensor | None = None
    out: Tensor
    bfloat: int
    batch: int
    rows: int
    width: int
    stride: int
    out_stride: int
    scale: float = 1.0
    add: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gated:
    """a_i = act(gate_i x) * (up_i x) [- fill_i] for every neuron, or for those listed.

    gate, up [rows, width]; out [batch, rows], compact in the order of index [rows] int32 up to count [1] int32.
    mask [batch, rows] uint8: neurons that a sequence does not keep are 0 for it.
    """

    gate: Tensor
    up: Tensor
    x: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    fill: Tensor | None = None
    index: Tensor | None = None
    count: Tensor | None = None
    mask: Tensor | None = None
    out: Tensor
    bfloat: int
    batch: int
    rows: int
    width: int
    stride: int
    activation: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronSparse:
    """The gated neurons whose first value reaches its threshold, else 0; rows of `second` are read for kept ones only.

    gate_first: first is the gate matrix and |act(first x)| decides; else it is the up matrix and |first x| decides.
    threshold [1] (step 0) or [rows] (step 1), float32; read [1] int64 gains the number of second rows read.
    """

    first: Tensor
    second: Tensor
    x: Tensor
    first_bias: Tensor | None = None
    second_bias: Tensor | None = None
    threshold: Tensor
    fill: Tensor | None = None
    out: Tensor
    read: Tensor
    bfloat: int
    batch: int
    rows: int
    width: int
    stride: int
    step: int
    activation: int
    gate_first: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """out = scale * (sum of x_i * weight_i over kept inputs + base), or out += that; weight [inputs, outputs].

    Kept: x_i != 0 (`keep`), else the `top` largest of |x_i| * score_i per sequence (0: those at or over threshold [1]).
    index [inputs] int32, count [1] int32: x is compact and input i is row index_i. A row is read when any sequence
    keeps it. out [batch, .], rows `out_stride` apart; chunks: pieces of the inputs that are summed apart, so that the
    result does not depend on the number of threads; scratch: batch * (inputs + chunks * outputs) floats; list [inputs]
    int32; read [1] int64 gains the rows read; dropped [batch, inputs] gets what was not kept; fill [inputs] is taken
    off the inputs that are kept.
    """

    weight: Tensor
    x: Tensor
    score: Tensor | None = None
    threshold: Tensor | None = None
    base: Tensor | None = None
    fill: Tensor | None = None
    index: Tensor | None = None
    count: Tensor | None = None
    out: Tensor
    dropped: Tensor | None = None
    scratch: Tensor
    list: Tensor
    read: Tensor
    bfloat: int
    batch: int
    inputs: int
    outputs: int
    stride: int
    chunks: int
    keep: int = 0
    top: int = 0
    out_stride: int
    add: int = 0
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Top:
    """The `top` units of highest score of every sequence (ties: the lower one) as a list of neurons and masks.

    score [batch, units] float32; a unit is a neuron, or stands for members [units, members_each] int32 (-1: none).
    sizes [units] int32: `top` counts neurons then, and units are taken until they hold as many. always [neurons] uint8:
    kept beside.
    index [neurons] int32 ascending up to count [1] int32: the union; mask [batch, neurons] uint8: each sequence's own.
    """

    score: Tensor
    members: Tensor | None = None
    sizes: Tensor | None = None
    always: Tensor | None = None
    index: Tensor
    count: Tensor
    mask: Tensor
    read: Tensor
    batch: int
    units: int
    top: int
    members_each: int = 1
    neurons: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attend:
    """Attention of one token a sequence over the live part of its cache and itself; the cache gains the token.

    qkv [batch, (heads + 2 * kv_heads) * head_dim]; q_norm, k_norm [head_dim] or None; cosine, sine [length,
    rotary / 2] or None (no rotation); keys, values [batch, kv_heads, length, head_dim]; position [1] int32; left
    [batch] int64: positions of padding in front; active [batch, kv_heads] uint8 or None: other groups give 0 and are
    not read; out [batch, heads * head_dim]; scores [batch * heads * length] scratch; window 0: all positions.
    """

    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None
    keys: Tensor
    values: Tensor
    position: Tensor
    left: Tensor
    active: Tensor | None
    out: Tensor
    scores: Tensor
    bfloat: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    rotary: int
    window: int
    scale: float
    softcap: float
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embed:
    """out = scale * embedding[token]: embedding [vocab, width]; token [batch] int64; out [batch, width]."""

    embedding: Tensor
    token: Tensor
    out: Tensor
    bfloat: int
    batch: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Next:
    """The next token of every sequence: the forced one where there is one, else the argmax; position + 1.

    logits [batch, vocab]; forced, tokens [batch, length] int64, forced -1 where free; token [batch] int64; position
    [1] int32.
    """

    logits: Tensor
    forced: Tensor
    token: Tensor
    tokens: Tensor
    position: Tensor
    batch: int
    vocab: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multiply:
    """out = act(gate) * up [- fill], 0 where mask is 0: halves [batch, 2 * neurons], gate first; out [batch, neurons].

    mask [batch, neurons] uint8; fill [neurons] float32.
    """

    halves: Tensor
    mask: Tensor | None = None
    fill: Tensor | None = None
    out: Tensor
    batch: int
    neurons: int
    activation: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decide:
    """The neurons whose |act(value)| reaches its threshold, as a list and as masks.

    value [batch, .], rows `stride` apart; threshold, step, read as in `NeuronSparse`; index, count, mask as in `Top`.
    """

    value: Tensor
    threshold: Tensor
    index: Tensor
    count: Tensor
    mask: Tensor
    read: Tensor
    batch: int
    neurons: int
    stride: int
    step: int
    activation: int


Op = Norm | Rows | Gated | NeuronSparse | Columns | Top | Attend | Embed | Next | Multiply | Decide
KINDS: tuple[type, ...] = (Norm, Rows, Gated, NeuronSparse, Columns, Top, Attend, Embed, Next, Multiply, Decide)


def chunks_of(inputs: int) -> int:
    """Pieces into which a product that skips inputs is cut: a power of two, each of some 128 inputs or more."""
    return min(MAX_CHUNKS, 1 << max(0, (inputs // CHUNK_INPUTS).bit_length() - 1))


def bfloat(weight: Tensor) -> int:
    """1 for bfloat16, 0 for float32: the two that the operators read."""
    return int(weight.dtype == torch.bfloat16)
