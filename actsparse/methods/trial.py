"""The gates of a stored plan, tried on ones before they meet a model: what a file holds may not fit, or lie."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actsparse.errors import PlanError, reason_of
from actsparse.methods.base import Fit
from actsparse.methods.gates import ChannelRule, FixedGate, LayerGates, NeuronGate, PrefillGate
from actsparse.results import SiteKind, Unit

# What Python and torch raise where tensors are missing, of another shape or of another type.
MISFITS = (
    KeyError, IndexError, RuntimeError, TypeError, ValueError, AssertionError, AttributeError, StopIteration,
    ZeroDivisionError, OverflowError,
)  # fmt: skip
TOKENS = 2
MOST_LAYERS = 10_000


def check_entries(fit: Fit, name: str) -> None:
    """Raise PlanError where the entries of a fit make no sense by themselves, or a tensor holds NaN."""
    places = [(one.layer, one.unit) for one in fit.layers]
    if not places or len(set(places)) != len(places):
        raise _damaged(name, "it has no layer, or one of them twice")
    for one in fit.layers:
        if not 0 <= one.layer < MOST_LAYERS or one.width < 1:
            raise _damaged(name, f"there is no layer {one.layer} of {one.width}")
        if one.kept is not None and not 0 <= one.kept <= one.width:
            raise _damaged(name, f"layer {one.layer} keeps {one.kept} of {one.width}")
    for key, tensor in fit.tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise _damaged(name, f"{key} holds NaN")


def try_gates(name: str, gates: Sequence[LayerGates], widths: Mapping[Unit, int], neurons: Sequence[int]) -> None:
    """Raise PlanError where a gate does not answer with a mask over the units of its layer.

    `widths` by unit, `neurons` of each of the gates' FFNs.
    """
    for place, (layer, width) in enumerate(zip(gates, neurons, strict=True)):
        try:
            _try_layer(layer, dict(widths) | {Unit.NEURON: width})
        except MISFITS as error:
            raise _damaged(name, f"layer {place}: {reason_of(error)}") from error


def _damaged(name: str, what: str) -> PlanError:
    return PlanError(f"the plan {name} cannot be used: {what}", "fit it again: actsparse threshold RUN --force")


def _try_layer(gates: LayerGates, widths: Mapping[Unit, int]) -> None:
    if gates.neurons is not None:
        _is_mask(_neurons_kept(gates.neurons, widths), widths[Unit.NEURON])
        fill = gates.neurons.fill
        if fill is not None and (fill.shape != (widths[Unit.NEURON],) or not fill.is_floating_point()):
            raise ValueError(f"the fill is {_described(fill)}, and the layer has {widths[Unit.NEURON]} neurons")
    for unit, rule in gates.rules.items():
        _try_channels(rule, widths[unit])
    if gates.heads is not None:
        x = _ones(gates.heads.site, widths)
        if x is not None:
            _is_mask(gates.heads.rule.keep(x), widths[Unit.KV_GROUP])


def _neurons_kept(gate: NeuronGate, widths: Mapping[Unit, int]) -> Tensor | None:
    """What a gate keeps of a layer's neurons; None where the width of what it reads is not known."""
    if isinstance(gate, FixedGate):
        return gate.mask
    x = _ones(gate.site, widths)
    if x is None:
        return None
    if isinstance(gate, PrefillGate):
        statistic = gate.statistic()
        statistic.add(x)
        return gate.rule(statistic.value())
    return gate.rule.keep(x)


def _try_channels(rule: ChannelRule, width: int) -> None:
    x = torch.ones(TOKENS, width)
    if rule.basis is not None:
        x = x @ rule.basis.float()
    _is_mask(rule.rule.keep(x), width)
    if rule.correction is not None:
        outer, inner = rule.correction
        _ = torch.ones(TOKENS, width) @ inner.float() @ outer.float().T


def _ones(site: SiteKind, widths: Mapping[Unit, int]) -> Tensor | None:
    """Activations at a site of a layer [tokens, width]; None where its width is not known."""
    units = {
        SiteKind.ATTN_IN: (Unit.Q, Unit.QKV),
        SiteKind.ATTN_OUT: (Unit.O,),
        SiteKind.MLP_IN: (Unit.UP, Unit.GATE_UP),
    }.get(site, (Unit.NEURON,))
    width = next((widths[unit] for unit in units if unit in widths), None)
    return None if width is None else torch.ones(TOKENS, width)


def _is_mask(kept: Tensor | None, width: int) -> None:
    if kept is not None and (kept.dtype != torch.bool or kept.shape[-1:] != (width,)):
        raise ValueError(f"its mask is {_described(kept)}, and the layer has {width} units")


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
