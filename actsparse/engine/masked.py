"""The masked path: a plan's gates applied to a dense model. Exact at any shape, and never faster than dense.

The one place where gates are applied and counted over whole texts. Positions before the prompt's end run dense; from
there on what was dropped is zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.engine.gating import READER, Edit, PlanState, SiteValues
from actsparse.engine.heads import kv_kept
from actsparse.engine.points import Replaced, visited
from actsparse.methods.gates import LayerGates
from actsparse.models.projections import Projection
from actsparse.models.sites import Ffn, ModelSites
from actsparse.models.taps import ForwardPass, watched
from actsparse.results import Unit


@dataclass
class Tally:
    """What was counted of one unit in one layer over sparse positions: units kept of all, and the sum of
    ||y - y_mask|| / ||y||."""

    kept: float = 0.0
    units: int = 0
    positions: int = 0
    errors: float = 0.0

    def count(self, mask: Bool[Tensor, "*positions units"]) -> None:
        """Count the kept units of sparse positions."""
        self.kept += float(mask.count_nonzero())
        self.units += mask.numel()
        self.positions += mask.numel() // mask.shape[-1]

    def add(self, other: "Tally") -> None:
        """Add what was counted elsewhere."""
        self.kept += other.kept
        self.units += other.units
        self.positions += other.positions
        self.errors += other.errors

    @property
    def kept_frac(self) -> float:
        """The share of units kept; 1 where nothing was sparse."""
        return self.kept / self.units if self.units else 1.0

    @property
    def mean_error(self) -> float:
        """The mean relative error over the positions counted."""
        return self.errors / max(1, self.positions)


class MaskedPlan:
    """The gates of one plan over one batch of sequences, with what they did, by unit and layer."""

    def __init__(self, gates: Sequence[LayerGates], *, prompt_length: int, sink_tokens: int) -> None:
        self.gates = list(gates)
        self.state = PlanState(gates, prompt_length=prompt_length, sink_tokens=sink_tokens)
        self.prompt_length = prompt_length
        self.tallies: dict[tuple[Unit, int], Tally] = {}

    def edit(self, unit: Unit, layer: int, x: Tensor, values: SiteValues, start: int) -> tuple[slice, Edit | None]:
        """Which of the positions at hand are sparse, and the edit there (None: nothing to do)."""
        if unit is Unit.NEURON:
            self.state.observe(layer, values, start)
        sparse = slice(max(0, self.prompt_length - start), x.shape[1])
        edit = self.state.edit(unit, layer, x, values, sparse) if sparse.start < sparse.stop else None
        if edit is not None:
            own = None if unit is not Unit.NEURON or values.routed is None else values.routed[:, sparse]
            self.tally(unit, layer).count(edit.mask if own is None else edit.mask[own])
        return sparse, edit

    def replaced(self, unit: Unit, layer: int, x: Tensor, values: SiteValues, start: int) -> Replaced | None:
        """The input of a projection under the plan, counted; None where it stays."""
        sparse, edit = self.edit(unit, layer, x, values, start)
        return None if edit is None else in_place(x, sparse, edit)

    def tally(self, unit: Unit, layer: int) -> Tally:
        """The counts of a unit in a layer."""
        return self.tallies.setdefault((unit, layer), Tally())

    def by_layer(self, sites: ModelSites) -> dict[tuple[Unit, int], Tally]:
        """The counts by unit and layer: those of a layer's experts added up."""
        found: dict[tuple[Unit, int], Tally] = {}
        for (unit, place), tally in self.tallies.items():
            layer = sites.ffns[place].layer.index if unit is Unit.NEURON else place
            found.setdefault((unit, layer), Tally()).add(tally)
        return found

    def kept_frac(self, unit: Unit = Unit.NEURON) -> list[float]:
        """The share kept of a unit in each layer, over the sparse positions counted so far."""
        return [self.tally(unit, layer).kept_frac for layer in range(len(self.gates))]


class _Positions:
    """Where the forward pass at work stands in its sequences: passes follow each other without a gap."""

    def __init__(self) -> None:
        self.start = 0
        self.stop = 0

    def begin(self, forward: ForwardPass) -> None:
        self.start, self.stop = self.stop, self.stop + forward.tokens


@contextmanager
def masked(sites: ModelSites, plan: MaskedPlan, *, errors: bool = False) -> Iterator[None]:
    """Run the model's forward passes under a plan: one pass over whole blocks, or prefill and then token by token.

    With `errors`, the relative error of the projections' outputs on the sparse path's own inputs is added up.
    """
    at = _Positions()

    def visit(unit: Unit, layer: int, x: Tensor, values: SiteValues) -> Replaced | None:
        sparse, edit = plan.edit(unit, layer, x, values, at.start)
        if edit is None:
            return None
        if errors:
            reader = reader_of(sites, unit, layer)
            plan.tally(unit, layer).errors += float(edit_errors(reader, x[:, sparse], edit).sum())
        return in_place(x, sparse, edit)

    with (
        watched(sites, at.begin),
        kv_kept(sites, plan.gates, prompt_length=plan.prompt_length),
        visited(sites, [plan.gates], visit),
    ):
        yield


@contextmanager
def probed(sites: ModelSites, plans: Sequence[MaskedPlan]) -> Iterator[None]:
    """Run forward passes dense, and measure what each plan's gates would do to them: counts and local errors."""
    at = _Positions()

    def visit(unit: Unit, layer: int, x: Tensor, values: SiteValues) -> None:
        reader = reader_of(sites, unit, layer)
        dense: dict[int, Tensor] = {}
        for plan in plans:
            sparse, edit = plan.edit(unit, layer, x, values, at.start)
            if edit is not None:
                part = x[:, sparse]
                if sparse.start not in dense:
                    dense[sparse.start] = reader.product(part).norm(dim=-1)
                found = edit_errors(reader, part, edit, dense[sparse.start])
                plan.tally(unit, layer).errors += float(found.sum())

    with watched(sites, at.begin), visited(sites, [plan.gates for plan in plans], visit):
        yield


def reader_of(sites: ModelSites, unit: Unit, layer: int) -> Projection | Ffn:
    """What reads a unit: the projection itself for channels, `down` for neurons (of an expert: its own), `o` for KV
    groups."""
    if unit is Unit.NEURON and sites.moe_layers:
        return sites.ffns[layer]
    return sites.layers[layer].projections[READER.get(unit, unit)]


def edit_errors(
    reader: Projection | Ffn,
    x: Float[Tensor, "batch seq in"],
    edit: Edit,
    dense: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """||y - y_mask|| / ||y|| at every position, y = W x without bias, in float32; 0 where y is zero.

    `dense` is ||y|| where it is known.
    """
    change, added = reader.product(x - edit.kept), edit.added(x)
    lost = (change if added is None else change - added).norm(dim=-1)
    if dense is None:
        dense = reader.product(x).norm(dim=-1)
    return torch.where(dense > 0, lost / dense, 0.0)


def relative_errors(
    a: Float[Tensor, "batch seq neurons"],
    mask: Bool[Tensor, "batch seq neurons"],
    down: Float[Tensor, "hidden neurons"],
    dense: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """The same of the MLP output under a mask over neurons, with the down projection as a matrix."""
    weight = down.T.float()
    dropped = (torch.where(mask, 0.0, a.float()) @ weight).norm(dim=-1)
    if dense is None:
        dense = (a.float() @ weight).norm(dim=-1)
    return torch.where(dense > 0, dropped / dense, 0.0)


def in_place(x: Float[Tensor, "batch seq in"], sparse: slice, edit: Edit) -> Replaced:
    """The whole input with the edit of its sparse positions in it, and what is added to the output there."""
    edited = x.clone()
    edited[:, sparse] = edit.kept
    added = edit.added(x[:, sparse])
    return Replaced(edited, None if added is None else torch.nn.functional.pad(added, (0, 0, sparse.start, 0)))
