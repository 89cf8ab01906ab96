"""What a step does in each layer: the parts of a plan as tensors, one record a way of saving bytes.

Any mix is allowed: another record in every layer, channel rules beside a neuron rule, heads beside both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from actsparse.engine.step.plans import Selection
from actsparse.results import SiteKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listed:
    """The neurons of a list, chosen before the token: gate, up, down_rows [rows, width].

    index [rows] int32 into those rows, up to count [1] int32; mask [batch, rows] uint8 where sequences of a batch keep
    different ones, or None; fill [rows] float32 (what a dropped neuron takes), with base [width] = W_d fill.
    """

    gate: Tensor
    up: Tensor
    down_rows: Tensor
    index: Tensor
    count: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    mask: Tensor | None = None
    fill: Tensor | None = None
    base: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decided:
    """Neurons kept where the first value reaches threshold [1] or [neurons]; `gate_first`: |act(gate)|, else |up|."""

    threshold: Tensor
    down_rows: Tensor
    gate_first: bool
    fill: Tensor | None = None
    base: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """Gate and up whole; rows of down where |a| * score reaches threshold [1], or for the `top` largest."""

    down_rows: Tensor
    score: Tensor | None = None
    threshold: Tensor | None = None
    top: int = 0
    fill: Tensor | None = None
    base: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The `top` units of largest logit second @ first @ x: first [rank, width], or None for logits second @ x.

    tanh: between the two. site: whose activations x are; ahead 1: those of the layer before. A unit stands for members
    [units, each] int32 (-1: none); with sizes [units] int32, units are taken until they hold `top` neurons. always
    [neurons] uint8: kept beside.
    """

    second: Tensor
    top: int
    site: SiteKind
    first: Tensor | None = None
    ahead: int = 0
    tanh: bool = False
    members: Tensor | None = None
    sizes: Tensor | None = None
    always: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """The neurons that a router chooses before the MLP runs."""

    router: Chosen
    down_rows: Tensor
    fill: Tensor | None = None
    base: Tensor | None = None


Mlp = Listed | Decided | Scored | Routed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channels:
    """Input channels of one projection, whose weight is stored [inputs, outputs] in `rows`.

    Kept where |z| * score reaches threshold [1], or the `top` largest, with z = basis x (basis [inputs, inputs], and
    rows those of the rotated weight) or x. correction (U [outputs, k], V^T [k, inputs]) adds U V^T of what was dropped.
    """

    rows: Tensor
    threshold: Tensor | None = None
    top: int = 0
    score: Tensor | None = None
    basis: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """The KV groups that a router chooses; out_rows [query_width, width]: the output projection, one row an input.

    query_rows [kv_heads, queries] int32: the rows of q (and, with `whole`, of k and v) that a group needs.
    """

    router: Chosen
    out_rows: Tensor
    query_rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWork:
    """What one layer does; what is None or missing runs dense."""

    mlp: Mlp | None = None
    channels: Mapping[str, Channels] = field(default_factory=dict)
    heads: Groups | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatePlan:
    """The work of every layer.

    neurons [layers, batch, neurons], where given, receives the activations of layers whose MLP runs dense. selection:
    the lists of all `Listed` layers, one a row. records: the step keeps what every rule chose for the last token.
    """

    layers: tuple[LayerWork, ...]
    neurons: Tensor | None = None
    selection: Selection | None = None
    records: bool = False
