"""A plan under the model's own `generate`: whatever drives the model, prompts run dense and decoded tokens sparse.

A forward pass without a cache behind it starts a new sequence; passes of several tokens are prompt (also in chunks);
passes of one token after a prompt are decode. Masks are chosen at the first decoded token and kept for the sequence.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from actsparse.engine.gating import PlanState, SiteValues
from actsparse.engine.points import Replaced, visited
from actsparse.engine.slicing import SlicedMlps, sliceable
from actsparse.engine.sparse import chosen_mask, why_not_sliced
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites
from actsparse.models.taps import ForwardPass, tapped, watched
from actsparse.results import Site, SiteKind, Unit

WHOLE_PROMPT = 2**31


class _Phases:
    """Follows the forward passes of a model: which gates have seen what, and whether the pass at work is decode."""

    def __init__(self, gates: Sequence[LayerGates], sink_tokens: int) -> None:
        self.gates = list(gates)
        self.sink_tokens = sink_tokens
        self.at_work = ForwardPass(batch=1, tokens=1, past=0, padding=())
        self.state = PlanState(gates, prompt_length=WHOLE_PROMPT, sink_tokens=sink_tokens)
        self.decoded = False
        self.ever_decoded = False
        self.passes = 0

    def begin(self, forward: ForwardPass) -> None:
        """Note a pass that is about to run."""
        self.at_work = forward
        self.passes += 1
        self.ever_decoded |= self.decoding
        if forward.past == 0:
            self.decoded = False
            self.state = PlanState(self.gates, prompt_length=WHOLE_PROMPT, sink_tokens=self.sink_tokens)

    @property
    def decoding(self) -> bool:
        """Whether the pass at work decodes one token after a prompt."""
        return self.at_work.past > 0 and self.at_work.tokens == 1

    def observe(self, layer: int, values: SiteValues) -> None:
        """See a prompt's activations; what is fed after the first decoded token changes no mask."""
        if not self.decoding and not self.decoded:
            self.state.observe(layer, values, self.at_work.past, self.at_work.padding)

    def edited(self, unit: Unit, layer: int, x: Tensor, values: SiteValues) -> Replaced | None:
        """The input of a projection under the plan: as it is in a prompt, edited for a decoded token."""
        if unit is Unit.NEURON:
            self.observe(layer, values)
        if not self.decoding:
            return None
        self.decoded = True
        edit = self.state.edit(unit, layer, x, values, slice(0, None))
        return None if edit is None else Replaced(edit.kept, edit.added(x))


@contextmanager
def sparse_generation(sites: ModelSites, gates: Sequence[LayerGates], *, sink_tokens: int) -> Iterator[None]:
    """Every decode step of the model runs under the gates while the block runs; then the model is as before.

    Batch 1 under gates over neurons that decide by the end of the prompt: weights are sliced. Otherwise, each
    sequence's own gates are applied to its activations: exact, and not faster.
    """
    phases = _Phases(gates, sink_tokens)
    if why_not_sliced(gates):
        with watched(sites, phases.begin), visited(sites, [phases.gates], phases.edited):
            yield
    else:
        with sliceable(sites) as mlps, _sliced(sites, phases, mlps), torch.no_grad():
            yield
    if phases.passes and not phases.ever_decoded:
        warnings.warn(
            "no token was decoded after a prompt: every pass ran dense, so what was measured is the dense model",
            stacklevel=3,
        )


@contextmanager
def _sliced(sites: ModelSites, phases: _Phases, mlps: SlicedMlps) -> Iterator[None]:
    values = SiteValues()

    def begin(forward: ForwardPass) -> None:
        phases.begin(forward)
        if not phases.decoding or forward.batch > 1:
            mlps.dense()
        elif phases.decoded:
            mlps.sparse()
        else:
            mlps.keep([chosen_mask(state, mlps.neurons) for state in phases.state.neurons])
            phases.decoded = True

    def on_value(site: Site, a: Tensor) -> Tensor | None:
        if phases.decoding and phases.at_work.batch == 1:
            return None
        values.see(site, a)
        found = phases.edited(Unit.NEURON, site.layer, a, values) if site.kind is SiteKind.NEURON else None
        return None if found is None else found.input

    kinds = {SiteKind.NEURON, *(kind for layer in phases.gates for kind in layer.sites)}
    with watched(sites, begin), tapped(sites, dict.fromkeys(kinds, on_value)):
        yield
