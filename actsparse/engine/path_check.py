"""Whether the engine and the masked path mean the same, on some tokens of a text.

Rounding flips marginal entries of per-token masks, and a flip grows through layers and cache: two right implementations
drift apart. So where rules choose token by token, the masked path is given what the engine chose, and the two questions
are apart: do they choose alike, and do they compute alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.engine.choose import Run
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import ChannelGate, Custom, LayerGates, Rule, TokenGate
from actsparse.models.sites import ModelSites
from actsparse.results import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class PathCheck:
    """difference: the largest in NLL on a token, in nats, over those where both are finite (NaN without any).

    lost: tokens where the masked path is finite and the engine is not; flips: the share of entries that the rules
    choose otherwise on the masked path's own activations (None where the masks were not given).
    """

    difference: float
    lost: int = 0
    flips: float | None = None


@torch.no_grad()
def path_check(
    run: Run, sites: ModelSites, gates: Sequence[LayerGates], block: Int[Tensor, " seq"], prompt: int, *,
    sink_tokens: int, followed_by: int | None = None,
) -> PathCheck:  # fmt: skip
    """Engine against masked path over the tokens of `block` behind its first `prompt` ones, all but the last.

    The engine reads what it would read if `followed_by` tokens were decoded (None: lists of what is kept).
    """
    tokens, targets = block[None, prompt:-1], block[prompt + 1 :]
    run.prefill(block[None, :prompt], watch=True)
    run.select(followed_by)
    run.use(sparse=True)
    chosen = run.chosen(tokens) if any(layer.decides_by_token for layer in gates) else None
    found = run.forced(tokens)[0] if chosen is None else chosen[0][0]
    run.use(sparse=False)
    forced = None if chosen is None else _Forced(chosen[1])
    used = gates if forced is None else [forced.gates(layer, one) for layer, one in enumerate(gates)]
    with masked(sites, MaskedPlan(used, prompt_length=prompt, sink_tokens=sink_tokens)):
        expected = sites.model(input_ids=block[None, :-1], use_cache=False).logits[0, prompt:]
    return _compared(_nll(found, targets), _nll(expected, targets), None if forced is None else forced.flips)


def _compared(ours: Float[Tensor, " count"], masks: Float[Tensor, " count"], flips: float | None) -> PathCheck:
    both = ours.isfinite() & masks.isfinite()
    difference = float((ours - masks)[both].abs().max()) if both.any() else nan
    return PathCheck(difference=difference, lost=int((masks.isfinite() & ~ours.isfinite()).sum()), flips=flips)


class _Forced:
    """Gates that choose what they are told, and count where they would have chosen otherwise."""

    def __init__(self, masks: Mapping[tuple[Unit, int], Bool[Tensor, "1 count units"]]) -> None:
        self._masks = masks
        self._other = 0
        self._units = 0

    @property
    def flips(self) -> float:
        """The share of entries chosen otherwise."""
        return self._other / max(1, self._units)

    def gates(self, layer: int, one: LayerGates) -> LayerGates:
        """The gates of a layer with the rules that choose token by token replaced."""
        neurons, heads = one.neurons, one.heads
        if isinstance(neurons, TokenGate):
            neurons = replace(neurons, rule=self._rule(Unit.NEURON, layer, neurons.rule))
        if heads is not None:
            heads = replace(heads, rule=self._rule(Unit.KV_GROUP, layer, heads.rule))
        rules = {unit: replace(rule, rule=self._rule(unit, layer, rule.rule)) for unit, rule in one.rules.items()}
        return replace(one, neurons=neurons, heads=heads, channels=ChannelGate(rules) if rules else None)

    def _rule(self, unit: Unit, layer: int, rule: Rule) -> Rule:
        parts = {Unit.QKV: Unit.Q, Unit.GATE_UP: Unit.GATE}  # one rule for all of them, on the same input
        mask = self._masks[parts.get(unit, unit), layer]

        def keep(x: Tensor) -> Tensor:
            own = rule.keep(x)
            # an exact 0 is dropped by both, whatever a mask says
            self._other += int(((own != mask) & (x != 0 if x.shape == mask.shape else True)).sum())
            self._units += mask.numel()
            return mask

        return Custom(keep)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.double().log_softmax(dim=-1).gather(1, targets[:, None].to(logits.device)).squeeze(1).cpu()
