"""The places of a forward pass where gates act: the inputs of projections, in one view for every kind of unit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from actsparse.engine.gating import EDITED, SiteValues, units_of
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites
from actsparse.models.taps import IN_EXPERTS, Callback, projections_tapped, tapped
from actsparse.results import Site, SiteKind, Unit


@dataclass(frozen=True)
class Replaced:
    """A projection's input [batch, seq, in] as it shall be, and what to add to its output [batch, seq, out]."""

    input: Tensor
    added: Tensor | None = None


Visit = Callable[[Unit, int, Tensor, SiteValues], Replaced | None]


@contextmanager
def visited(
    sites: ModelSites, plans: Sequence[Sequence[LayerGates]], visit: Visit, layers: tuple[int, ...] | None = None
) -> Iterator[None]:
    """Call `visit(unit, layer, x, values)` at every input that a gate of the plans edits while the block runs.

    In a mixture of experts each expert is visited, its place among the model's FFNs standing for the layer.

    x [batch, seq, width] is the input of the projection that reads the unit; `values` hold what rules read;
    `layers` are those that are visited (None: all). None leaves the pass alone.
    """
    units, values = units_of(plans), SiteValues()
    at = {EDITED[unit]: unit for unit in units if not unit.is_projection}
    added: dict[tuple[Unit, int], Tensor] = {}
    mixed = bool(sites.moe_layers)

    def on_input(layer: int, unit: Unit, x: Tensor) -> Tensor | None:
        found = visit(unit, layer, x, values)
        if found is None:
            return None
        if found.added is not None:
            added[unit, layer] = found.added
        return found.input

    def on_output(layer: int, unit: Unit, y: Tensor) -> Tensor | None:
        change = added.pop((unit, layer), None)
        return None if change is None else y + change.to(y.dtype)

    def on_site(site: Site, x: Tensor) -> Tensor | None:
        place = sites.ffn_index[site.layer, site.expert] if mixed and site.kind in IN_EXPERTS else site.layer
        values.see(Site(layer=place, kind=site.kind), x)
        values.routed = tap.routed
        unit = at.get(site.kind)
        return None if unit is None else on_input(place, unit, x)

    kinds = {kind for plan in plans for layer in plan for kind in layer.sites} | set(at)
    callbacks: dict[SiteKind, Callback] = dict.fromkeys(kinds, on_site)
    with ExitStack() as stack:
        tap = stack.enter_context(tapped(sites, callbacks, layers))
        projections = [unit for unit in units if unit.is_projection]
        corrected = any(rule.correction for plan in plans for layer in plan for rule in layer.rules.values())
        if projections:
            stack.enter_context(
                projections_tapped(sites, projections, on_input, on_output if corrected else None, layers)
            )
        yield
