"""Reading and editing activations: the only file that registers hooks.

Every family gives the same view: a callback gets `(site, x)` with x [batch, seq, width]. A callback that returns None
observes; one that returns a tensor of the same shape replaces the activation. In a mixture of experts each expert is a
site of its own, with rows of zeros where a token went elsewhere: `Tap.routed` says which are its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actsparse.errors import ModelError
from actsparse.models.experts import Observer, observed
from actsparse.models.sites import LayerSites, ModelSites
from actsparse.results import SHARED_EXPERT, Site, SiteKind, Unit

Callback = Callable[[Site, Tensor], Tensor | None]
ProjectionCallback = Callable[[int, Unit, Tensor], Tensor | None]
IN_EXPERTS = frozenset({SiteKind.GATE, SiteKind.UP, SiteKind.NEURON})


class Tap:
    """What callbacks may ask about the site that they are called at."""

    routed: Bool[Tensor, "batch seq"] | None = None
    """The tokens that the expert at work serves; None where every token passes."""


@contextmanager
def tapped(
    sites: ModelSites, callbacks: Mapping[SiteKind, Callback], layers: tuple[int, ...] | None = None
) -> Iterator[Tap]:
    """Call `callbacks[kind]` at every site of that kind while the block runs; no hook outlives it."""
    shape, tap = _TokenShape(), Tap()
    chosen = [layer for layer in sites.layers if layers is None or layer.index in layers]
    with ExitStack() as stack:
        stack.callback(_trunk(sites).register_forward_pre_hook(shape.note, with_kwargs=True).remove)
        for layer in chosen:
            for kind, callback in callbacks.items():
                for handle in _attach(layer, kind, callback, shape):
                    stack.callback(handle.remove)
        inside = {kind: callback for kind, callback in callbacks.items() if kind in IN_EXPERTS}
        experts = {
            layer.experts.module: _expert_observer(layer.index, inside, shape, tap)
            for layer in chosen
            if layer.experts is not None and inside
        }
        if experts:
            stack.enter_context(observed(sites.model, experts))
        yield tap


@contextmanager
def projections_tapped(
    sites: ModelSites,
    units: Collection[Unit],
    on_input: ProjectionCallback,
    on_output: ProjectionCallback | None = None,
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Call `on_input(layer, unit, x)` before and `on_output(layer, unit, y)` after these projections run.

    x [batch, seq, in], y [batch, seq, out]. Inside a `tapped` block it sees inputs as the site callbacks left them.
    """
    handles: list[RemovableHandle] = []
    shape = _TokenShape()
    try:
        handles.append(_trunk(sites).register_forward_pre_hook(shape.note, with_kwargs=True))
        for layer in sites.layers:
            for unit, projection in layer.projections.items():
                if unit in units and (layers is None or layer.index in layers):
                    before = partial(_ask_projection, on_input, layer.index, unit, shape)
                    handles.append(projection.module.register_forward_pre_hook(partial(_replace_input, before)))
                    if on_output is not None:
                        after = partial(_ask_projection, on_output, layer.index, unit, shape)
                        handles.append(projection.module.register_forward_hook(partial(_replace_output, after)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class BlockCall:
    """How a model called one of its layers on one sequence, and the hidden states that came back [1, seq, hidden]."""

    args: tuple
    kwargs: dict
    output: Tensor

    def again(self, layer: LayerSites) -> Tensor:
        """The hidden states of the same call now."""
        return hidden_of(layer.block(*self.args, **self.kwargs))


@contextmanager
def block_calls(sites: ModelSites) -> Iterator[dict[int, list[BlockCall]]]:
    """Collect how every layer is called while the block runs, by layer; batches of one, without a cache."""
    found: dict[int, list[BlockCall]] = {layer.index: [] for layer in sites.layers}

    def keep(index: int, _module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        found[index].append(BlockCall(args, kwargs, hidden_of(output)))

    with ExitStack() as stack:
        for layer in sites.layers:
            handle = layer.block.register_forward_hook(partial(keep, layer.index), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


def hidden_of(output: object) -> Tensor:
    """The hidden states in what a layer returns: themselves, or first in a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """A forward pass about to run: `tokens` new positions of `batch` sequences after `past` cached ones.

    `padding`: positions of padding in front of each sequence, from the attention mask (empty without one).
    """

    batch: int
    tokens: int
    past: int
    padding: tuple[int, ...]


@contextmanager
def watched(sites: ModelSites, callback: Callable[[ForwardPass], None]) -> Iterator[None]:
    """Call `callback` before every forward pass of the model while the block runs."""

    def note(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = _tokens_of(args, kwargs)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        padding: tuple[int, ...] = ()
        if isinstance(mask, Tensor) and mask.dim() == 2:
            padding = tuple(mask.long().argmax(dim=1).tolist())
        past = 0 if cache is None else int(cache.get_seq_length())
        callback(ForwardPass(batch=ids.shape[0], tokens=ids.shape[1], past=past, padding=padding))

    handle = _trunk(sites).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attended(
    sites: ModelSites, callback: Callable[[int, tuple, dict], None], layers: tuple[int, ...]
) -> Iterator[None]:
    """Call `callback(layer, args, kwargs)` before the attention of each of these layers runs."""

    def note(layer: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        callback(layer, args, kwargs)

    with ExitStack() as stack:
        for layer in sites.layers:
            if layer.index in layers:
                hook = partial(note, layer.index)
                stack.callback(layer.attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


_muted: ContextVar[bool] = ContextVar("muted", default=False)


@contextmanager
def muted() -> Iterator[None]:
    """Run modules of a tapped model without any callback: what runs is no part of the forward pass."""
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)


def _trunk(sites: ModelSites) -> nn.Module:
    """The module that runs the layers; OPT's causal model calls it directly, past its own base model."""
    return sites.model.get_submodule(sites.family.layers.rpartition(".")[0])


def _tokens_of(args: tuple, kwargs: dict) -> Tensor:
    """input_ids [batch, seq] or inputs_embeds [batch, seq, hidden] of a forward pass."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tokens = next((one for one in given if one is not None), None)
    if tokens is None:
        raise ModelError("the forward pass got no tokens", "pass input_ids or inputs_embeds")
    return tokens


class _TokenShape:
    """Batch and sequence length of the forward pass at work (OPT flattens its tokens inside a layer)."""

    def __init__(self) -> None:
        self.batch = 1
        self.tokens = 0

    def note(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = _tokens_of(args, kwargs)
        self.batch, self.tokens = ids.shape[0], ids.shape[0] * ids.shape[1]

    def view(self, x: Tensor) -> Tensor:
        return x.view(self.batch, -1, x.shape[-1]) if x.dim() == 2 else x


def _attach(layer: LayerSites, kind: SiteKind, callback: Callback, shape: _TokenShape) -> Iterator[RemovableHandle]:
    """Hook one layer; experts are not hooked but observed."""
    at = partial(_ask, callback, Site(layer=layer.index, kind=kind), shape)
    if kind is SiteKind.ROUTER:
        if layer.experts is not None:
            yield layer.experts.router.register_forward_hook(partial(_show_logits, at))
    elif kind is SiteKind.ATTN_IN:
        yield layer.qkv[0].register_forward_pre_hook(partial(_replace_input, at))
    elif kind is SiteKind.ATTN_OUT:
        yield layer.output.register_forward_pre_hook(partial(_replace_input, at))
    elif kind is SiteKind.MLP_IN:
        # a gated MLP reads its input twice, so an edit must reach both projections
        module = layer.up if layer.experts is None and layer.gate is None else layer.mlp
        yield module.register_forward_pre_hook(partial(_replace_input, at))
    elif layer.experts is None:
        yield _attach_neurons(layer, kind, at)
    elif layer.shared is not None:
        shared = Site(layer=layer.index, kind=kind, expert=SHARED_EXPERT)
        yield _attach_neurons(layer.shared, kind, partial(_ask, callback, shared, shape))


def _attach_neurons(layer: LayerSites, kind: SiteKind, at: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    if kind is SiteKind.GATE:
        return layer.activation.register_forward_hook(partial(_replace_output, at))
    if kind is SiteKind.UP:
        return _attach_up(layer, at)
    return layer.down.register_forward_pre_hook(partial(_replace_input, at))


def _expert_observer(layer: int, callbacks: Mapping[SiteKind, Callback], shape: _TokenShape, tap: Tap) -> Observer:
    """Shows the rows of an expert as [batch, seq, width]."""

    def on_rows(kind: SiteKind, expert: int, tokens: Tensor, x: Tensor) -> Tensor | None:
        if kind not in callbacks:
            return None
        whole = x.new_zeros(shape.tokens, x.shape[-1])
        whole[tokens] = x
        routed = torch.zeros(shape.tokens, dtype=torch.bool, device=x.device)
        routed[tokens] = True
        tap.routed = routed.view(shape.batch, -1)
        try:
            edited = callbacks[kind](Site(layer=layer, kind=kind, expert=expert), shape.view(whole))
        finally:
            tap.routed = None
        return None if edited is None else edited.reshape(whole.shape)[tokens]

    return on_rows


def _show_logits(at: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: tuple, output: tuple) -> None:
    """Show a router's logits; they are not to be edited, since its choice is made."""
    at(output[0])


def _attach_up(layer: LayerSites, at: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    if layer.gate is None:
        raise ModelError(
            f"model type '{layer.family.model_type}' has a non-gated FFN: there is no separate up projection",
            "use a method that reads the neurons themselves",
        )
    if not layer.family.fused_gate_up:
        return layer.up.register_forward_hook(partial(_replace_output, at))

    def on_fused(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        width = output.shape[-1] // 2
        edited = at(output[..., width:])
        if edited is None:
            return None
        merged = output.clone()
        merged[..., width:] = edited
        return merged

    return layer.up.register_forward_hook(on_fused)


def _ask(callback: Callback, site: Site, shape: _TokenShape, x: Tensor) -> Tensor | None:
    edited = callback(site, shape.view(x))
    return None if edited is None else edited.reshape(x.shape)


def _ask_projection(
    callback: ProjectionCallback, layer: int, unit: Unit, shape: _TokenShape, x: Tensor
) -> Tensor | None:
    edited = callback(layer, unit, shape.view(x))
    return None if edited is None else edited.reshape(x.shape)


def _replace_output(at: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: tuple, output: Tensor) -> object:
    return None if _muted.get() else at(output)


def _replace_input(at: Callable[[Tensor], Tensor | None], _module: nn.Module, args: tuple) -> tuple | None:
    edited = None if _muted.get() else at(args[0])
    return None if edited is None else (edited, *args[1:])
