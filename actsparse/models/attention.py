"""KV policies: what becomes of the keys and values of heads that are dropped at a token (methods.md, section 3).

An implementation of transformers' attention interface that stands around the model's own one, and of its mask
interface, without which padded batches would be attended to unmasked. Dropped units are KV groups: their heads add
nothing at that token, and what the policy leaves in the cache is all that later tokens find there. One pass over whole
sequences and token by token on a cache mean the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actsparse.errors import ModelError
from actsparse.models.attention_call import AttentionCall, KeptCall, base_forward
from actsparse.models.families import FAMILIES
from actsparse.models.sites import ModelSites
from actsparse.models.taps import attended, muted
from actsparse.results import KvPolicy

FLUSH_EVERY = 16
BASES = ("sdpa", "eager")

Choose = Callable[[Tensor | None, slice], Tensor]
"""(head outputs [batch, positions, heads * head_dim] or None, positions of the pass) -> kept groups [batch, positions,
kv_heads]."""

_states: WeakKeyDictionary[nn.Module, "LayerState"] = WeakKeyDictionary()


@dataclass(frozen=True)
class KvRule:
    """How the KV groups of one layer are chosen and what a dropped one leaves behind.

    `needs_outputs`: `choose` decides from the head outputs (an oracle); it is then asked position by position where
    what it drops changes what later positions see.
    """

    policy: KvPolicy
    choose: Choose
    needs_outputs: bool = False


@contextmanager
def kv_policies(
    sites: ModelSites, rules: Mapping[int, KvRule], *, prompt_length: int
) -> Iterator[dict[int, "LayerState"]]:
    """Run forward passes under KV policies: consecutive passes over one batch of sequences, dense before
    `prompt_length`.

    The heads' outputs are left as they are: whoever masks them zeroes those of dropped groups. Yields the state of each
    layer that has a rule. Raises ModelError on a family whose attention does not go through the interface.
    """
    check_interface(sites)
    model = sites.model
    before = model.config._attn_implementation or BASES[0]
    base = before if before in BASES else BASES[0]
    name = f"actsparse_{base}"
    ALL_ATTENTION_FUNCTIONS.register(name, _attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    states = {
        layer.index: LayerState(layer.attention, base, rules.get(layer.index), prompt_length) for layer in sites.layers
    }
    for state in states.values():
        _states[state.module] = state
    lazy = tuple(index for index, rule in rules.items() if rule.policy is KvPolicy.LAZY)
    model.set_attn_implementation(name)
    try:
        with attended(sites, lambda layer, args, kwargs: states[layer].note_call(args, kwargs), lazy):
            yield {index: states[index] for index in rules}
    finally:
        model.set_attn_implementation(before)
        for state in states.values():
            _states.pop(state.module, None)


def check_interface(sites: ModelSites) -> None:
    """Raise ModelError where a family's attention does not go through transformers' AttentionInterface."""
    if not sites.family.attention_interface:
        served = sorted(name for name, row in FAMILIES.items() if row.attention_interface)
        raise ModelError(
            f"the attention of '{sites.family.model_type}' does not go through transformers' AttentionInterface:"
            " its heads cannot be masked with a KV policy",
            f"those that do: {', '.join(served)}",
        )


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _states[module].attend(query, key, value, attention_mask, kwargs), None


class LayerState:
    """The keys and values of one layer under a rule.

    `present` [batch, kv_heads, positions]: whether a position has an entry; `projected`: how many entries `lazy` has
    projected after the fact. While `dense`, nothing is dropped (a prompt whose length is not known yet).
    """

    def __init__(self, module: nn.Module, base: str, rule: KvRule | None, prompt_length: int) -> None:
        self.module = module
        self.rule = rule
        self.prompt_length = prompt_length
        self.dense = False
        self.stop = 0
        self.present: Bool[Tensor, "batch kv_heads positions"] | None = None
        self.projected = 0
        self.base = base_forward(module, base)
        self._calls: list[KeptCall] = []
        self._captured: list[tuple[Tensor, Tensor]] | None = None

    def restart(self) -> None:
        """Begin a new batch of sequences."""
        self.stop = 0
        self.present = None
        self._calls = []

    def note_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a call that is about to run."""
        if self._captured is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            stop = self.stop + hidden.shape[1]
            if stop > self.prompt_length and not self.dense:
                self._calls.append(KeptCall(self.stop, stop, args, kwargs))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """The heads' outputs of the new positions; `key` and `value` (the cache's own) are left as the policy says."""
        if self._captured is not None:
            self._captured.append((key, value))
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        if self.rule is None:
            return self.base(query, key, value, mask, kwargs)
        view = AttentionCall(self, self.stop, query, key, value, mask, kwargs)
        self.stop = view.stop
        self._extend(view)
        sparse = slice(max(0, self.prompt_length - view.start), query.shape[2])
        if self.dense or sparse.start >= sparse.stop or self.rule.policy is KvPolicy.COMPUTE_ALL:
            return view.outputs()
        if self.rule.policy is KvPolicy.LAZY:
            return self._attend_lazily(view, sparse)
        if self.rule.needs_outputs:
            return self._attend_stepwise(view, sparse)
        self._write(view, sparse, self.rule.choose(None, sparse))
        return view.outputs()

    def _extend(self, view: AttentionCall) -> None:
        batch, groups = view.key.shape[:2]
        new = torch.ones(batch, groups, view.stop - view.start, dtype=torch.bool, device=view.key.device)
        self.present = new if self.present is None else torch.cat([self.present, new], dim=2)

    def _write(self, view: AttentionCall, sparse: slice, keep: Bool[Tensor, "batch seq kv_heads"]) -> None:
        """Leave at the positions `sparse` of the pass what the policy leaves of dropped groups."""
        assert self.rule is not None
        assert self.present is not None
        dropped = ~keep.transpose(1, 2).to(view.key.device)
        start, stop = view.start + sparse.start, view.start + sparse.stop
        if self.rule.policy is KvPolicy.COPY_PREV:
            self._copy_previous(view, start, stop, dropped)
            return
        view.erase(start, stop, dropped)
        if self.rule.policy is not KvPolicy.ZERO:
            self.present[:, :, start:stop] &= ~dropped

    def _copy_previous(self, view: AttentionCall, start: int, stop: int, dropped: Tensor) -> None:
        """A dropped entry becomes the one before it, itself perhaps a copy; without one before, it is a hole."""
        assert self.present is not None
        places = torch.arange(start, stop, device=dropped.device).expand_as(dropped)
        source = torch.where(dropped, start - 1, places).cummax(dim=2).values
        if start == 0:
            self.present[:, :, :stop] &= source >= 0
        else:
            self.present[:, :, start:stop] = self.present.gather(2, source)
        index = (source.clamp_min(0) - view.offset)[..., None]
        for whole in (view.key, view.value):
            whole[:, :, start - view.offset : stop - view.offset] = whole.gather(
                2, index.expand(-1, -1, -1, whole.shape[-1])
            )

    def _attend_stepwise(self, view: AttentionCall, sparse: slice) -> Tensor:
        """Position by position: each is decided from its outputs, its own entry present, before the next one looks."""
        assert self.rule is not None
        outputs = [view.outputs(slice(0, sparse.start))] if sparse.start else []
        for place in range(sparse.start, sparse.stop):
            at = slice(place, place + 1)
            outputs.append(view.outputs(at))
            self._write(view, at, self.rule.choose(outputs[-1].flatten(2), at))
        return torch.cat(outputs, dim=1)

    def _attend_lazily(self, view: AttentionCall, sparse: slice) -> Tensor:
        """Dropped entries stay out of the cache until their group is next kept, or until a flush."""
        assert self.rule is not None
        assert self.present is not None
        looked = None
        if self.rule.needs_outputs:
            # an oracle has to look at every group: what it looked at and drops is let go again
            before = self.present.clone()
            self._project(view, ~self.present)
            looked = view.outputs()
            view.erase(0, view.stop, ~before)
            self.present = before
        keep = self.rule.choose(None if looked is None else looked.flatten(2)[:, sparse], sparse)
        self._write(view, sparse, keep)
        self._project(view, self._wanted(view, sparse, keep) & ~self.present)
        self._calls = [call for call in self._calls if not self.present[:, :, call.start : call.stop].all()]
        return view.outputs() if looked is None else looked

    def _wanted(self, view: AttentionCall, sparse: slice, keep: Tensor) -> Bool[Tensor, "batch kv_heads positions"]:
        """Entries up to the last token at which their group is kept, and up to the last flush."""
        kept = keep.transpose(1, 2).to(view.key.device)
        places = torch.arange(view.start + sparse.start, view.start + sparse.stop, device=kept.device)
        flushed = (places - self.prompt_length + 1) % FLUSH_EVERY == 0
        last = torch.where(kept | flushed, places, -1).amax(dim=2, keepdim=True)
        return torch.arange(view.stop, device=kept.device) <= last

    def _project(self, view: AttentionCall, wanted: Bool[Tensor, "batch kv_heads positions"]) -> None:
        """Project missing entries from the inputs that were kept, with the attention's own code."""
        assert self.present is not None
        for call in self._calls:
            part = wanted[:, :, call.start : call.stop]
            places = part.any(dim=(0, 1)).nonzero().squeeze(1)
            if not len(places):
                continue
            args, kwargs = call.at(places)
            self._captured = []
            try:
                with muted():
                    self.module.forward(*args, **kwargs)
                found = self._captured[0]
            finally:
                self._captured = None
            view.fill(call.start + places, part[:, :, places], found)
            self.projected += int(part.sum())
        self.present = self.present | wanted
