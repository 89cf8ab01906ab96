"""Reading and editing activations: the only file that registers hooks.

Every family gives the same view: a callback gets `(site, x)` with x [batch, seq, width]. A callback that returns None
observes; one that returns a tensor of the same shape replaces the activation.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actsparse.errors import ModelError
from actsparse.models.sites import LayerSites, ModelSites
from actsparse.results import Site, SiteKind

Callback = Callable[[Site, Tensor], Tensor | None]


@contextmanager
def tapped(
    sites: ModelSites, callbacks: Mapping[SiteKind, Callback], layers: tuple[int, ...] | None = None
) -> Iterator[None]:
    """Call `callbacks[kind]` at every site of that kind while the block runs; no hook outlives it."""
    handles: list[RemovableHandle] = []
    shape = _TokenShape()
    try:
        handles.append(_trunk(sites).register_forward_pre_hook(shape.note, with_kwargs=True))
        for layer in sites.layers:
            if layers is None or layer.index in layers:
                for kind, callback in callbacks.items():
                    handles.append(_attach(layer, kind, callback, shape))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        self.batch = 0

    def note(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.batch = _tokens_of(args, kwargs).shape[0]

    def view(self, x: Tensor) -> Tensor:
        return x.view(self.batch, -1, x.shape[-1]) if x.dim() == 2 else x


def _attach(layer: LayerSites, kind: SiteKind, callback: Callback, shape: _TokenShape) -> RemovableHandle:
    at = partial(_ask, callback, Site(layer=layer.index, kind=kind), shape)
    if kind is SiteKind.GATE:
        return layer.activation.register_forward_hook(partial(_replace_output, at))
    if kind is SiteKind.UP:
        return _attach_up(layer, at)
    module = {
        SiteKind.ATTN_IN: layer.qkv[0],
        SiteKind.ATTN_OUT: layer.output,
        # a gated MLP reads its input twice, so an edit must reach both projections
        SiteKind.MLP_IN: layer.up if layer.gate is None else layer.mlp,
        SiteKind.NEURON: layer.down,
    }[kind]
    return module.register_forward_pre_hook(partial(_replace_input, at))


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


def _replace_output(at: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: tuple, output: Tensor) -> object:
    return at(output)


def _replace_input(at: Callable[[Tensor], Tensor | None], _module: nn.Module, args: tuple) -> tuple | None:
    edited = at(args[0])
    return None if edited is None else (edited, *args[1:])
