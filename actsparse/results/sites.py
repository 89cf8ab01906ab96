"""Where activations are read and what is kept or dropped: sites, units, and the policies of dropped heads."""

from dataclasses import dataclass
from enum import StrEnum


class SiteKind(StrEnum):
    """Where an activation is read. Every family presents each as [batch, seq, width].

    `attn_in`: input of the query projection; `attn_out`: input of the output projection (concatenated heads);
    `mlp_in`: input of the MLP; `gate`: output of the activation function; `up`: output of the up projection;
    `neuron`: input of the down projection; `kv`: keys and values; `router`: the logits of a mixture of experts.
    """

    ATTN_IN = "attn_in"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    GATE = "gate"
    UP = "up"
    NEURON = "neuron"
    KV = "kv"
    ROUTER = "router"


SHARED_EXPERT = -1
"""The number of the expert that serves every token, beside the routed ones (counted from 0)."""


class Unit(StrEnum):
    """What is kept or dropped: neurons of an MLP, input channels of a projection (fused ones are `qkv`, `gate_up`), or
    KV groups of heads."""

    NEURON = "neuron"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    O = "o"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    KV_GROUP = "kv_group"

    @property
    def is_projection(self) -> bool:
        """Whether the units are input channels of a projection."""
        return self not in (Unit.NEURON, Unit.KV_GROUP)


class KvPolicy(StrEnum):
    """What becomes of the keys and values of a head that is dropped at a token (methods.md, section 3)."""

    COMPUTE_ALL = "compute_all"
    DROP = "drop"
    ZERO = "zero"
    LAZY = "lazy"
    COPY_PREV = "copy_prev"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place where activations are read: one kind in one layer, and in one of its experts where it has some."""

    layer: int
    kind: SiteKind
    expert: int | None = None

    @property
    def name(self) -> str:
        """The kind, `shared_KIND` in the expert that serves every token."""
        return f"shared_{self.kind}" if self.expert == SHARED_EXPERT else str(self.kind)

    @classmethod
    def named(cls, layer: int, name: str) -> "Site":
        """The site of a layer that has this `name`."""
        expert = SHARED_EXPERT if name.startswith("shared_") else None
        return cls(layer=layer, kind=SiteKind(name.removeprefix("shared_")), expert=expert)
