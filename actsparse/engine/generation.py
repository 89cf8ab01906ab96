"""A plan under the model's own `generate`: whatever drives the model, prompts run dense and decoded tokens sparse.

A forward pass without a cache behind it starts a new sequence; passes of several tokens are prompt (also in chunks);
passes of one token after a prompt are decode. Masks are chosen at the first decoded token and kept for the sequence.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from actsparse.engine.gating import GateState
from actsparse.engine.slicing import SlicedMlps, sliceable
from actsparse.methods.base import FixedGate, Gate, TokenGate
from actsparse.models.sites import ModelSites
from actsparse.models.taps import Callback, ForwardPass, tapped, watched
from actsparse.results import Site, SiteKind

WHOLE_PROMPT = 2**31


class _Phases:
    """Follows the forward passes of a model: which gates have seen what, and whether the pass at work is decode."""

    def __init__(self, gates: Sequence[Gate], sink_tokens: int) -> None:
        self.gates = gates
        self.sink_tokens = sink_tokens
        self.at_work = ForwardPass(batch=1, tokens=1, past=0, padding=())
        self.states: list[GateState] = []
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
            self.states = [
                GateState(gate, prompt_length=WHOLE_PROMPT, sink_tokens=self.sink_tokens) for gate in self.gates
            ]

    @property
    def decoding(self) -> bool:
        """Whether the pass at work decodes one token after a prompt."""
        return self.at_work.past > 0 and self.at_work.tokens == 1

    def observe(self, site: Site, a: Tensor) -> None:
        """See a prompt's activations; what is fed after the first decoded token changes no mask."""
        if not self.decoding and not self.decoded:
            self.states[site.layer].observe(a, self.at_work.past, self.at_work.padding)


@contextmanager
def sparse_generation(sites: ModelSites, gates: Sequence[Gate], *, sink_tokens: int) -> Iterator[None]:
    """Every decode step of the model runs under the gates while the block runs; then the model is as before.

    Batch 1 under gates that decide by the end of the prompt: weights are sliced. Otherwise, each sequence's own mask is
    applied to its activations: exact, and not faster.
    """
    phases = _Phases(gates, sink_tokens)
    if any(isinstance(gate, TokenGate) for gate in gates):
        with _masked(sites, phases):
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
def _masked(sites: ModelSites, phases: _Phases) -> Iterator[None]:
    values: dict[SiteKind, Tensor] = {}

    def on_value(site: Site, x: Tensor) -> Tensor | None:
        values[site.kind] = x
        if site.kind is not SiteKind.NEURON:
            return None
        phases.observe(site, x)
        if not phases.decoding:
            return None
        phases.decoded = True
        return torch.where(phases.states[site.layer].masks(values, slice(None)), x, 0.0)

    kinds = {SiteKind.NEURON} | {gate.site for gate in phases.gates if isinstance(gate, TokenGate)}
    callbacks: dict[SiteKind, Callback] = dict.fromkeys(kinds, on_value)
    with watched(sites, phases.begin), tapped(sites, callbacks):
        yield


@contextmanager
def _sliced(sites: ModelSites, phases: _Phases, mlps: SlicedMlps) -> Iterator[None]:
    def begin(forward: ForwardPass) -> None:
        phases.begin(forward)
        if not phases.decoding or forward.batch > 1:
            mlps.dense()
        elif phases.decoded:
            mlps.sparse()
        else:
            mlps.keep([_mask(state, mlps.neurons) for state in phases.states])
            phases.decoded = True

    def on_value(site: Site, a: Tensor) -> Tensor | None:
        phases.observe(site, a)
        if not phases.decoding or phases.at_work.batch == 1:
            return None
        phases.decoded = True
        return torch.where(phases.states[site.layer].masks({SiteKind.NEURON: a}, slice(None)), a, 0.0)

    with watched(sites, begin), tapped(sites, {SiteKind.NEURON: on_value}):
        yield


def _mask(state: GateState, neurons: int) -> Tensor:
    if isinstance(state.gate, FixedGate):
        return state.gate.mask
    return state.chosen()[0] if state.ready else torch.ones(neurons, dtype=torch.bool)
