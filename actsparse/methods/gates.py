"""Gates: what of a layer a method keeps. Types only; they say what to keep and never touch activations.

One place (`engine.masked`) applies and counts them, engines leave out the weights of what was dropped, so all mean the
same. A rule is data where it has a closed form, so that an engine can run it; `Custom` wraps any function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.overlap import topk_masks
from actsparse.results import KvPolicy, SiteKind, Unit

ALL_MATRICES = frozenset({"gate", "up", "down"})


class Rule(Protocol):
    """Chooses units from the values of one token, for any number of tokens at once."""

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens units"]:
        """The units that are kept at each token."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Keeps |x_i| * weights_i >= values: one threshold, or one a unit [units]; `weights` [units] (None: all 1)."""

    values: float | Tensor
    weights: Tensor | None = None

    def keep(self, x: Float[Tensor, "*tokens units"]) -> Bool[Tensor, "*tokens units"]:
        """The units at or over their threshold."""
        values = self.values.to(x.device) if isinstance(self.values, Tensor) else self.values
        return weighed(x, self.weights) >= values


@dataclass(frozen=True)
class TopK:
    """Keeps the `count` largest |x_i| * weights_i of each token; among equals the lower index."""

    count: int
    weights: Tensor | None = None

    def keep(self, x: Float[Tensor, "*tokens units"]) -> Bool[Tensor, "*tokens units"]:
        """Exactly `count` units a token."""
        return topk_masks(weighed(x, self.weights), self.count / x.shape[-1])


@dataclass(frozen=True)
class Router:
    """Keeps the `count` largest logits second @ first @ x: two linear layers without bias or non-linearity.

    first [rank, width], second [units, rank].
    """

    first: Tensor
    second: Tensor
    count: int

    def logits(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens units"]:
        """The router's logits, in its own dtype."""
        inner = x.to(self.first.dtype) @ self.first.to(x.device).T
        return inner @ self.second.to(x.device).T

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens units"]:
        """Exactly `count` units a token."""
        logits = self.logits(x)
        return topk_masks(logits, self.count / logits.shape[-1])


@dataclass(frozen=True)
class Protected:
    """Keeps what another rule keeps, and the units `always` [units] beside."""

    rule: Rule
    always: Bool[Tensor, " units"]

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens units"]:
        """The union of both."""
        return self.rule.keep(x) | self.always.to(x.device)


@dataclass(frozen=True)
class Fixed:
    """Keeps the same units at every token, whatever it reads: mask [units]."""

    mask: Bool[Tensor, " units"]

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens units"]:
        """The mask, once a token."""
        return self.mask.to(x.device).expand(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Custom:
    """Any function from values [*tokens, width] to a mask [*tokens, units]; it runs in the masked path alone."""

    function: Callable[[Tensor], Tensor]

    def keep(self, x: Float[Tensor, "*tokens width"]) -> Bool[Tensor, "*tokens units"]:
        """What the function keeps."""
        return self.function(x)


class Statistic(Protocol):
    """A running statistic of the prompt's activations of one sequence in one layer."""

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add tokens (sink tokens left out)."""
        ...

    def value(self) -> Float[Tensor, " neurons"]:
        """The statistic over everything added so far."""
        ...


@dataclass(frozen=True)
class FixedGate:
    """Keeps the same neurons for every token: mask [neurons].

    `saves`: the matrices whose bytes of a dropped neuron are not read. `fill` [neurons]: a dropped neuron takes this
    value in place of 0. An engine computes it as W_d[:, A] (a_A - fill_A) + W_d fill, so it costs one vector.
    """

    mask: Bool[Tensor, " neurons"]
    saves: frozenset[str] = ALL_MATRICES
    fill: Float[Tensor, " neurons"] | None = None


@dataclass(frozen=True)
class PrefillGate:
    """Chooses one mask at the end of the prompt: a statistic of the prompt at `site`, and a rule from it to a mask
    [neurons].

    `refresh_every` R: every R-th decoded token runs dense, its activations join the running statistic, and the mask is
    chosen again from the next token on (0: never). `saves` and `fill` as in `FixedGate`.
    """

    statistic: Callable[[], Statistic]
    rule: Callable[[Float[Tensor, " neurons"]], Bool[Tensor, " neurons"]]
    site: SiteKind = SiteKind.NEURON
    refresh_every: int = 0
    saves: frozenset[str] = ALL_MATRICES
    fill: Float[Tensor, " neurons"] | None = None


@dataclass(frozen=True)
class TokenGate:
    """Chooses for every token from the activations at `site`.

    `ahead` 1 reads the site of the layer before (the first layer then reads its own). `saves` and `fill` as in
    `FixedGate`. `ideal`: the rule needs what it saves, as an oracle does; its bytes are those of a mask known before.
    """

    site: SiteKind
    rule: Rule
    ahead: int = 0
    saves: frozenset[str] = ALL_MATRICES
    fill: Float[Tensor, " neurons"] | None = None
    ideal: bool = False

    def unread(self, gated: bool) -> frozenset[str]:
        """The matrices that are not read for a dropped neuron.

        In a non-gated FFN the activations come from the first matrix, `up`: a rule that reads them has read it.
        """
        reads_first = not gated and not self.ideal and self.site in (SiteKind.GATE, SiteKind.UP, SiteKind.NEURON)
        return self.saves - {"up"} if reads_first else self.saves


NeuronGate = FixedGate | PrefillGate | TokenGate


@dataclass(frozen=True)
class ChannelRule:
    """Keeps input channels of one projection y = W x, token by token.

    `basis` Q [in, in] orthogonal: channels are the coordinates x Q, and the kept ones are rotated back. `correction`
    (U [out, k], V [in, k]): adds U V^T (x - kept x) to the output.
    """

    rule: Rule
    basis: Float[Tensor, "in in"] | None = None
    correction: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class ChannelGate:
    """Input-channel rules by projection: `q`, `k`, `v`, `o`, `gate`, `up`, `down`; with fused weights `qkv`,
    `gate_up`. A projection without a rule runs whole."""

    rules: Mapping[Unit, ChannelRule]


@dataclass(frozen=True)
class HeadGate:
    """Chooses KV groups for every token from the activations at `site`; a dropped group's heads add nothing.

    `ahead` as in `TokenGate`. `policy`: what becomes of the keys and values of a dropped group.
    """

    site: SiteKind
    rule: Rule
    ahead: int = 0
    policy: KvPolicy = KvPolicy.COMPUTE_ALL

    @property
    def saves(self) -> frozenset[str]:
        """The matrices whose bytes of a dropped group are not read; keys and values that are wanted later must be."""
        needs_kv = self.policy in (KvPolicy.COMPUTE_ALL, KvPolicy.LAZY)
        return frozenset({"q", "o"}) if needs_kv else frozenset({"q", "k", "v", "o"})


@dataclass(frozen=True)
class LayerGates:
    """The gates of one layer; a part without a gate runs whole.

    `mlp_extra_bytes`, `attention_extra_bytes`: what the rules themselves read for a token (routers, adapters).
    """

    neurons: NeuronGate | None = None
    channels: ChannelGate | None = None
    heads: HeadGate | None = None
    mlp_extra_bytes: int = 0
    attention_extra_bytes: int = 0

    @property
    def extra_bytes(self) -> int:
        """What the rules of the layer read for a token."""
        return self.mlp_extra_bytes + self.attention_extra_bytes

    @property
    def rules(self) -> Mapping[Unit, ChannelRule]:
        """The channel rules by projection; empty without any."""
        return {} if self.channels is None else self.channels.rules

    @property
    def sites(self) -> frozenset[SiteKind]:
        """The sites that the rules of neurons and heads read."""
        gates = (self.neurons, self.heads)
        return frozenset(gate.site for gate in gates if isinstance(gate, PrefillGate | TokenGate | HeadGate))

    @property
    def decides_by_token(self) -> bool:
        """Whether any part of the layer decides token by token."""
        return bool(self.rules) or self.heads is not None or isinstance(self.neurons, TokenGate)


def neurons_only(gates: Sequence[LayerGates]) -> list[NeuronGate] | None:
    """The neuron gates of layers that have nothing else, one a layer; None where a layer has more, or has none."""
    found = [layer.neurons for layer in gates if layer.neurons and not layer.rules and layer.heads is None]
    return found if len(found) == len(gates) else None


def weighed(x: Tensor, weights: Tensor | None) -> Tensor:
    """|x|, or |x| * weights in float32 (float64 stays)."""
    if weights is None:
        return x.abs()
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.abs() * weights.to(x.device)
