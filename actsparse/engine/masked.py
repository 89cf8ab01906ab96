"""The masked path: a plan's masks applied to a dense model. Exact at any shape, and never faster than dense.

The one place where masks are applied and counted. Positions before the prompt's end run dense; from there on dropped
neurons are zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.engine.gating import GateState
from actsparse.methods.base import Gate, TokenGate
from actsparse.models.sites import ModelSites
from actsparse.models.taps import Callback, tapped
from actsparse.results import Site, SiteKind


class MaskedPlan:
    """The gates of one plan over one batch of sequences, with what they did, layer by layer.

    `kept` and `positions` count kept neurons over sparse positions; `errors` sums ||y - y_mask|| / ||y|| over them.
    """

    def __init__(self, gates: Sequence[Gate], *, prompt_length: int, sink_tokens: int) -> None:
        self.states = [GateState(gate, prompt_length=prompt_length, sink_tokens=sink_tokens) for gate in gates]
        self.prompt_length = prompt_length
        self.sites = {SiteKind.NEURON} | {gate.site for gate in gates if isinstance(gate, TokenGate)}
        self.kept = torch.zeros(len(gates), dtype=torch.float64)
        self.errors = torch.zeros(len(gates), dtype=torch.float64)
        self.positions = torch.zeros(len(gates), dtype=torch.int64)

    def masks(
        self, layer: int, values: dict[SiteKind, Tensor], start: int
    ) -> tuple[slice, Bool[Tensor, "batch #seq neurons"] | None]:
        """Which of the positions at hand are sparse, and their masks (None when none is)."""
        a = values[SiteKind.NEURON]
        self.states[layer].observe(a, start)
        sparse = slice(max(0, self.prompt_length - start), a.shape[1])
        if sparse.start >= sparse.stop:
            return sparse, None
        return sparse, self.states[layer].masks(values, sparse)

    def count(self, layer: int, mask: Bool[Tensor, "batch seq neurons"]) -> None:
        """Count the kept neurons of sparse positions."""
        self.kept[layer] += float(mask.sum())
        self.positions[layer] += mask.shape[0] * mask.shape[1]

    def kept_frac(self, widths: Sequence[int]) -> list[float]:
        """The share of neurons kept in each layer, over the sparse positions counted so far."""
        pairs = zip(self.kept.tolist(), self.positions.tolist(), widths, strict=True)
        return [kept / (positions * width) if positions else 1.0 for kept, positions, width in pairs]


class _Layers:
    """What passes through the taps of one forward pass: values of the layer at work, and positions."""

    def __init__(self) -> None:
        self.values: dict[SiteKind, Tensor] = {}
        self.start = 0
        self.stop = 0

    def see(self, site: Site, x: Tensor) -> None:
        if site.layer == 0 and site.kind is SiteKind.NEURON:
            self.start, self.stop = self.stop, self.stop + x.shape[1]
        self.values[site.kind] = x


@contextmanager
def masked(sites: ModelSites, plan: MaskedPlan, *, errors: bool = False) -> Iterator[None]:
    """Run the model's forward passes under a plan: one pass over whole blocks, or prefill and then token by token.

    With `errors`, the relative error of each layer's MLP output on the sparse path's own inputs is added up.
    """
    seen = _Layers()

    def on_value(site: Site, x: Tensor) -> Tensor | None:
        seen.see(site, x)
        if site.kind is not SiteKind.NEURON:
            return None
        sparse, mask = plan.masks(site.layer, seen.values, seen.start)
        if mask is None:
            return None
        mask = mask.expand(-1, sparse.stop - sparse.start, -1)
        plan.count(site.layer, mask)
        edited = x.clone()
        edited[:, sparse] = torch.where(mask, x[:, sparse], 0.0)
        if errors:
            down = sites.layers[site.layer].down_matrix(x.shape[-1])
            plan.errors[site.layer] += float(relative_errors(x[:, sparse], mask, down).sum())
        return edited

    callbacks: dict[SiteKind, Callback] = dict.fromkeys(plan.sites, on_value)
    with tapped(sites, callbacks):
        yield


@contextmanager
def probed(sites: ModelSites, plans: Sequence[MaskedPlan]) -> Iterator[None]:
    """Run forward passes dense, and measure what each plan's masks would do to them: counts and local errors."""
    seen = _Layers()
    kinds = {kind for plan in plans for kind in plan.sites}

    def on_value(site: Site, x: Tensor) -> None:
        seen.see(site, x)
        if site.kind is not SiteKind.NEURON:
            return
        down = sites.layers[site.layer].down_matrix(x.shape[-1])
        dense: Tensor | None = None
        for plan in plans:
            sparse, mask = plan.masks(site.layer, seen.values, seen.start)
            if mask is not None:
                mask = mask.expand(-1, sparse.stop - sparse.start, -1)
                plan.count(site.layer, mask)
                dense = (x[:, sparse].float() @ down.T.float()).norm(dim=-1) if dense is None else dense
                plan.errors[site.layer] += float(relative_errors(x[:, sparse], mask, down, dense).sum())

    callbacks: dict[SiteKind, Callback] = dict.fromkeys(kinds, on_value)
    with tapped(sites, callbacks):
        yield


def relative_errors(
    a: Float[Tensor, "batch seq neurons"],
    mask: Bool[Tensor, "batch seq neurons"],
    down: Float[Tensor, "hidden neurons"],
    dense: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """||y - y_mask|| / ||y|| at every position, in float32; 0 where y is zero. `dense` is ||y|| where it is known."""
    weight = down.T.float()
    dropped = (torch.where(mask, 0.0, a.float()) @ weight).norm(dim=-1)
    if dense is None:
        dense = (a.float() @ weight).norm(dim=-1)
    return torch.where(dense > 0, dropped / dense, 0.0)
