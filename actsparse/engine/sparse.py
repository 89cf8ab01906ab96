"""Sequence-level plans on a real model: dense prefill that is watched, one selection, then sliced decode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from actsparse.engine.decode import prefill
from actsparse.engine.gating import GateState
from actsparse.engine.slicing import SlicedMlps, sliceable
from actsparse.errors import PlanError
from actsparse.methods.gates import FixedGate, LayerGates, NeuronGate, PrefillGate, TokenGate, neurons_only
from actsparse.models.sites import ModelSites
from actsparse.models.taps import tapped
from actsparse.results import Site


class SparseDecoder:
    """Switches a model with sliceable projections between dense and the masks that the last prompt chose.

    Batch 1: `prefill` watches the prompt, `select` decides and gathers; then every pass reads kept neurons only.
    """

    def __init__(self, sites: ModelSites, gates: Sequence[NeuronGate], mlps: SlicedMlps, *, sink_tokens: int) -> None:
        self.sites = sites
        self.width = mlps.neurons
        self.gates = gates
        self.sink_tokens = sink_tokens
        self._mlps = mlps
        self._states: list[GateState] = []
        self._masks: list[Bool[Tensor, " neurons"]] = []

    @property
    def watches(self) -> bool:
        """Whether the masks depend on the prompt."""
        return any(isinstance(gate, PrefillGate) for gate in self.gates)

    def prefill(self, ids: Int[Tensor, "1 seq"], cache: Cache) -> Float[Tensor, "1 vocab"]:
        """Run a prompt dense, watching what the gates need; the logits of its last position."""
        self.dense()
        length = ids.shape[1]
        self._states = [GateState(g, prompt_length=length, sink_tokens=self.sink_tokens) for g in self.gates]
        if not self.watches:
            return prefill(self.sites.model, ids, cache)

        def watch(site: Site, x: Tensor) -> None:
            gate = self._states[site.layer].gate
            if isinstance(gate, PrefillGate) and gate.site is site.kind:
                self._states[site.layer].observe(x, 0)

        kinds = {gate.site for gate in self.gates if isinstance(gate, PrefillGate)}
        with tapped(self.sites, dict.fromkeys(kinds, watch)):
            return prefill(self.sites.model, ids, cache)

    def select(self) -> None:
        """Decide the masks of the prompt that was prefilled, and gather the kept weights."""
        self._masks = [chosen_mask(state, self.width) for state in self._states]
        self._mlps.keep(self._masks)

    def sparse(self) -> None:
        """Decode sparse from now on, with the masks selected last (nothing is gathered again)."""
        self._mlps.sparse()

    def dense(self) -> None:
        """Run dense from now on."""
        self._mlps.dense()

    @property
    def version(self) -> int:
        """Another number whenever the kept weights lie elsewhere than before."""
        return self._mlps.version

    @property
    def masks(self) -> list[Bool[Tensor, " neurons"]]:
        """The masks selected last, one a layer."""
        return self._masks


def chosen_mask(state: GateState | None, neurons: int) -> Bool[Tensor, " neurons"]:
    """The mask that holds for the whole sequence; a prompt that showed nothing to choose from keeps everything."""
    if state is None or not state.ready:
        return torch.ones(neurons, dtype=torch.bool)
    return state.gate.mask if isinstance(state.gate, FixedGate) else state.chosen()[0]


def why_not_sliced(gates: Sequence[LayerGates]) -> str | None:
    """Why sliced decode cannot run these gates; None where it can."""
    neurons = neurons_only(gates)
    if neurons is None:
        return "this plan drops more than neurons"
    if any(isinstance(gate, TokenGate) for gate in neurons):
        return "this plan decides token by token"
    if any(gate.fill is not None for gate in neurons):
        return "this plan fills in dropped neurons"
    if any(isinstance(gate, PrefillGate) and gate.refresh_every for gate in neurons):
        return "this plan chooses again while it decodes"
    return None


@contextmanager
def sparse_decoder(sites: ModelSites, gates: Sequence[LayerGates], *, sink_tokens: int) -> Iterator[SparseDecoder]:
    """A decoder of `sites` under sequence-level gates over neurons; the model is as before when the block ends.

    Raises PlanError where gates are of another kind, ModelError where weights cannot be sliced.
    """
    reason, neurons = why_not_sliced(gates), neurons_only(gates)
    if sites.moe_layers:
        reason = "this plan drops neurons of experts"
    if reason or neurons is None:
        raise PlanError(f"{reason} and has no engine yet", "evaluate its quality without timing")
    with sliceable(sites) as mlps, torch.no_grad():
        yield SparseDecoder(sites, neurons, mlps, sink_tokens=sink_tokens)
