"""KV policies of a plan's head gates at work: what later tokens find of the keys and values of dropped groups.

The gates zero the outputs of dropped groups elsewhere (`engine.gating`), for every policy; here the same rules say
which entries are left out of the cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from actsparse.engine.gating import SiteValues
from actsparse.errors import PlanError
from actsparse.methods.gates import HeadGate, LayerGates
from actsparse.models.attention import KvRule, LayerState, kv_policies
from actsparse.models.sites import ModelSites
from actsparse.models.taps import Callback, ForwardPass, tapped
from actsparse.results import KvPolicy, Site, SiteKind


@contextmanager
def kv_kept(sites: ModelSites, gates: Sequence[LayerGates], *, prompt_length: int) -> Iterator[dict[int, LayerState]]:
    """Apply the KV policies of head gates while the block runs; yields the state of each layer that has one.

    To be entered before whatever edits activations, so that rules read what the model computed. Raises PlanError where
    a rule reads what is known after attention only, ModelError where the family's attention is closed.
    """
    heads = {layer: found.heads for layer, found in enumerate(gates) if found.heads is not None}
    heads = {layer: gate for layer, gate in heads.items() if gate.policy is not KvPolicy.COMPUTE_ALL}
    if not heads:
        yield {}
        return
    values = SiteValues()

    def see(site: Site, x: Tensor) -> None:
        values.see(site, x)

    rules = {layer: _rule(layer, gate, values) for layer, gate in heads.items()}
    callbacks: dict[SiteKind, Callback] = dict.fromkeys({gate.site for gate in heads.values()}, see)
    with ExitStack() as stack:
        stack.enter_context(tapped(sites, callbacks))
        yield stack.enter_context(kv_policies(sites, rules, prompt_length=prompt_length))


def follow(kept: Mapping[int, LayerState], forward: ForwardPass, *, decoding: bool) -> None:
    """Tell the states of `kv_kept` about a pass that is about to run, where prompts and decoded tokens come as they
    like: a pass without a cache behind it starts new sequences, and only decoded tokens drop anything."""
    for state in kept.values():
        if forward.past == 0:
            state.restart()
        elif decoding and state.dense:
            state.prompt_length = forward.past
        state.dense = not decoding


def _rule(layer: int, gate: HeadGate, values: SiteValues) -> KvRule:
    own = gate.ahead == 0 or layer == 0
    if own and gate.site not in (SiteKind.ATTN_IN, SiteKind.ATTN_OUT):
        raise PlanError(
            f"layer {layer}: the heads' rule reads {gate.site}, which is known after attention only",
            f"let it read {SiteKind.ATTN_IN}, or use the policy {KvPolicy.COMPUTE_ALL}",
        )
    choose = partial(_chosen, layer, gate, values)
    return KvRule(gate.policy, choose, needs_outputs=own and gate.site is SiteKind.ATTN_OUT)


def _chosen(layer: int, gate: HeadGate, values: SiteValues, outputs: Tensor | None, places: slice) -> Tensor:
    return gate.rule.keep(values.of(gate, layer)[:, places] if outputs is None else outputs)
