"""A plan under the model's own `generate`: whatever drives the model, prompts run dense and decoded tokens sparse.

A forward pass without a cache behind it starts a new sequence; passes of several tokens are prompt (also in chunks);
passes of one token after a prompt are decode. Masks are chosen at the first decoded token and kept for the sequence.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from actsparse.engine.gating import SiteValues
from actsparse.engine.heads import follow, kv_kept
from actsparse.engine.own_steps import NO_ATOMICS
from actsparse.engine.phases import Phases
from actsparse.engine.points import visited
from actsparse.engine.slicing import SlicedMlps, sliceable
from actsparse.engine.sparse import chosen_mask, why_not_sliced
from actsparse.engine.stepping import Decode, own_steps, stepping
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites
from actsparse.models.taps import ForwardPass, tapped, watched
from actsparse.results import Site, SiteKind, Unit


@contextmanager
def sparse_generation(
    sites: ModelSites,
    gates: Sequence[LayerGates],
    *,
    sink_tokens: int,
    when_slower: Decode = "sparse",
    fast_atomics: bool = False,
) -> Iterator[None]:
    """Every decode step of the model runs under the gates while the block runs; then the model is as before.

    Models that have a step of our own, ready at once, decode by it (`own_steps`). Else, at batch 1 under gates over
    neurons that decide by the end of the prompt, weights are sliced. Otherwise, each sequence's own gates are applied
    to its activations: exact, and slower than dense, which a warning says.

    A step of our own measures itself first; `when_slower`: how it decodes where the plan is slower than dense.
    `fast_atomics`: see `OwnSteps`; it changes nothing, and a warning says so, where another way decodes.
    """
    phases = Phases(gates, sink_tokens)
    steps = own_steps(sites, gates, fast_atomics=fast_atomics)
    if steps is None and fast_atomics:
        warnings.warn(NO_ATOMICS, stacklevel=3)
    if steps is not None:
        with (
            watched(sites, phases.begin),
            visited(sites, [phases.gates], phases.edited),
            stepping(steps, phases, when_slower),
        ):
            yield
    elif reason := "experts are not sliced" if sites.moe_layers else why_not_sliced(gates):
        warnings.warn(f"masks are applied to the dense model: exact, and slower than dense ({reason})", stacklevel=3)
        with kv_kept(sites, gates, prompt_length=0) as kept:

            def begin(forward: ForwardPass) -> None:
                phases.begin(forward)
                follow(kept, forward, decoding=phases.decoding)

            with watched(sites, begin), visited(sites, [phases.gates], phases.edited):
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
def _sliced(sites: ModelSites, phases: Phases, mlps: SlicedMlps) -> Iterator[None]:
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
