"""From gates to the work of an engine: thresholds, lists and routers as tensors beside the weights they choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from actsparse.engine.step.plans import Selection
from actsparse.engine.step.sliced import empty_selection, list_kept
from actsparse.engine.step.weights import Weights, transpose_rows
from actsparse.engine.step.work import (
    Channels,
    Chosen,
    Decided,
    GatePlan,
    Groups,
    LayerWork,
    Listed,
    Mlp,
    Routed,
    Scored,
)
from actsparse.errors import PlanError
from actsparse.methods.experts import CentroidScores, Experts, TrainedScores
from actsparse.methods.gates import (
    ChannelRule,
    Fixed,
    FixedGate,
    HeadGate,
    LayerGates,
    NeuronGate,
    PrefillGate,
    Protected,
    Router,
    Rule,
    Threshold,
    TopK,
)
from actsparse.results import KvPolicy, SiteKind, Unit

EVERYTHING = torch.finfo(torch.float32).max
FUSED: Mapping[Unit, tuple[Unit, ...]] = {Unit.QKV: (Unit.Q, Unit.K, Unit.V), Unit.GATE_UP: (Unit.GATE, Unit.UP)}

OF_MLP = frozenset({"gate", "up", "down"})


class NoStepError(PlanError):
    """A decode step cannot run these gates; the message says why."""


class Translator:
    """Turns gates into plans over `weights`; matrices stored one row an input are made once and shared by plans."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._rows: dict[Unit, Tensor] = {}

    def plan(self, gates: Sequence[LayerGates], batch: int) -> GatePlan:
        """The work of every layer; raises NoStepError where a rule has no closed form, or asks for what no step does.

        Lists of neurons that gates choose after a prompt are empty until `choose_all` fills them.
        """
        if len(gates) != self.weights.shape.layers:
            raise NoStepError(f"{len(gates)} gates do not fit {self.weights.shape.layers} layers")
        lists = empty_selection(self.weights, self.weights.shape.neurons)
        layers = tuple(self._layer(index, layer, batch, lists) for index, layer in enumerate(gates))
        return GatePlan(layers=layers, selection=lists)

    def input_rows(self, unit: Unit, layer: int) -> Float[Tensor, "inputs outputs"]:
        """The weight of a projection, one row an input; q, k and v lie side by side, and so do gate and up."""
        match unit:
            case Unit.Q | Unit.K | Unit.V:
                parts = self.stacked(Unit.QKV)[layer].split(self.weights.shape.qkv_widths, dim=1)
                return parts[(Unit.Q, Unit.K, Unit.V).index(unit)]
            case Unit.GATE | Unit.UP:
                return self.stacked(Unit.GATE_UP)[layer].chunk(2, dim=1)[unit is Unit.UP]
            case _:
                return self.stacked(unit)[layer]

    def stacked(self, unit: Unit) -> Float[Tensor, "layers inputs outputs"]:
        """The weights of a projection in every layer, one row an input: `qkv`, `o`, `gate_up` or `down`."""
        if unit not in self._rows:
            weights = self.weights
            fused = {
                Unit.QKV: weights.qkv, Unit.O: weights.out, Unit.GATE_UP: weights.gate_up, Unit.DOWN: weights.down,
            }  # fmt: skip
            self._rows[unit] = transpose_rows(fused[unit])
        return self._rows[unit]

    def _layer(self, index: int, gates: LayerGates, batch: int, lists: Selection) -> LayerWork:
        channels = {
            one.value: self._channels(one, index, rule)
            for unit, rule in gates.rules.items()
            for one in FUSED.get(unit, (unit,))
        }
        if gates.heads is not None and channels.keys() & {"q", "k", "v", "o"}:
            raise NoStepError("a layer that drops both heads and channels of its attention has no step")
        mlp = None if gates.neurons is None else self._mlp(index, gates.neurons, batch, lists)
        if mlp is not None and channels.keys() & OF_MLP:
            if "down" in channels:
                raise NoStepError("a layer that drops both neurons and channels of its down projection has no step")
            if isinstance(mlp, Listed | Routed):
                raise NoStepError("neurons that are chosen before the MLP beside channels of it have no step")
        return LayerWork(
            mlp=mlp,
            channels=channels,
            heads=None if gates.heads is None else self._heads(index, gates.heads),
        )

    def _channels(self, unit: Unit, layer: int, rule: ChannelRule) -> Channels:
        top, threshold, score = self._closed(rule.rule)
        threshold, score = _single(threshold, score)
        rows, basis, correction = self.input_rows(unit, layer), None, None
        dtype, device = self.weights.dtype, self.weights.device
        if rule.basis is not None:
            # channel j of x Q meets column j of W Q, which is row j of Q^T W^T
            basis = rule.basis.to(device, torch.float32).T.contiguous()
            rows, basis = (basis @ rows.float()).to(dtype).contiguous(), basis.to(dtype)
        if rule.correction is not None:
            outer, inner = (one.to(device, dtype) for one in rule.correction)
            correction = (outer.contiguous(), inner.T.contiguous())
        return Channels(rows=rows, threshold=threshold, top=top, score=score, basis=basis, correction=correction)

    def _mlp(self, layer: int, gate: NeuronGate, batch: int, lists: Selection) -> Mlp:
        down_rows = self.input_rows(Unit.DOWN, layer)
        fill = base = None
        if gate.fill is not None:
            fill = self._floats(gate.fill)
            base = fill @ down_rows.float()
        if isinstance(gate, FixedGate | PrefillGate):
            if isinstance(gate, PrefillGate) and gate.refresh_every and gate.site is not SiteKind.NEURON:
                raise NoStepError(f"choosing again from {gate.site.value} has no step")
            return self._listed(layer, down_rows, fill, base, batch, lists)
        if gate.ideal:
            raise NoStepError("its masks need what they would save")
        rule, always = (gate.rule.rule, gate.rule.always) if isinstance(gate.rule, Protected) else (gate.rule, None)
        if isinstance(rule, Router | Experts):
            router = self._router(rule, gate.site, gate.ahead)
            if always is not None:
                router = replace(router, always=always.to(self.weights.device, torch.uint8).contiguous())
            return Routed(router=router, down_rows=down_rows, fill=fill, base=base)
        if gate.ahead:
            raise NoStepError("a lookahead without a router has no step")
        top, threshold, score = self._closed(rule)
        if always is not None:
            if threshold is None:
                raise NoStepError("neurons kept beside the largest ones have no step")
            threshold = torch.where(always.to(threshold.device), 0.0, threshold)
        if gate.site is SiteKind.NEURON:
            threshold, score = _single(threshold, score)
            return Scored(down_rows=down_rows, score=score, threshold=threshold, top=top, fill=fill, base=base)
        if gate.site not in (SiteKind.GATE, SiteKind.UP) or threshold is None:
            raise NoStepError(f"a rule of this kind that reads {gate.site.value} has no step")
        if score is not None:
            threshold = torch.where(score > 0, threshold / score, torch.where(threshold > 0, torch.inf, 0.0))
        return Decided(
            threshold=threshold, down_rows=down_rows, gate_first=gate.site is SiteKind.GATE, fill=fill, base=base
        )

    def _listed(
        self, layer: int, down_rows: Tensor, fill: Tensor | None, base: Tensor | None, batch: int, lists: Selection
    ) -> Listed:
        weights, neurons, device = self.weights, self.weights.shape.neurons, self.weights.device
        gate, up = weights.gate_up[layer].chunk(2)
        biases = (None, None) if weights.gate_up_bias is None else weights.gate_up_bias[layer].chunk(2)
        return Listed(
            gate=gate,
            up=up,
            down_rows=down_rows,
            index=lists.index[layer],
            count=lists.count[layer : layer + 1],
            gate_bias=biases[0],
            up_bias=biases[1],
            mask=torch.zeros(batch, neurons, dtype=torch.uint8, device=device) if batch > 1 else None,
            fill=fill,
            base=base,
        )

    def _heads(self, layer: int, gate: HeadGate) -> Groups:
        shape = self.weights.shape
        if gate.policy is not KvPolicy.COMPUTE_ALL:
            raise NoStepError(f"the KV policy {gate.policy.value} has no step")
        if not isinstance(gate.rule, Router):
            raise NoStepError("heads that are chosen without a router have no step")
        rows = torch.arange(shape.query_width, dtype=torch.int32, device=self.weights.device)
        return Groups(
            router=self._router(gate.rule, gate.site, gate.ahead),
            out_rows=self.input_rows(Unit.O, layer),
            query_rows=rows.view(shape.kv_heads, -1),
        )

    def _router(self, rule: Router | Experts, site: SiteKind, ahead: int) -> Chosen:
        if site not in (SiteKind.ATTN_IN, SiteKind.MLP_IN):
            raise NoStepError(f"a router that reads {site.value} has no step")
        if isinstance(rule, Experts):
            return self._experts(rule, site, ahead)
        first, second = self._floats(rule.first), self._floats(rule.second)
        return Chosen(first=first, second=second, top=rule.count, site=site, ahead=ahead)

    def _experts(self, rule: Experts, site: SiteKind, ahead: int) -> Chosen:
        """A router over experts: its units are the experts' lists of neurons, padded with -1."""
        match rule.scores:
            case CentroidScores(centroids=centroids):  # the input's own length does not change the order
                first, second, tanh = None, F.normalize(centroids.float(), dim=-1), False
            case TrainedScores(first=first, second=second):
                tanh = True
            case _:
                raise NoStepError("experts that are not scored by a router have no step")
        lists = [(rule.expert_of == expert).nonzero().squeeze(1) for expert in range(len(rule.sizes))]
        members = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
        device = self.weights.device
        return Chosen(
            first=None if first is None else self._floats(first),
            second=self._floats(second),
            top=rule.count,
            site=site,
            ahead=ahead,
            tanh=tanh,
            members=members.to(device, torch.int32).contiguous(),
            sizes=rule.sizes.to(device, torch.int32).contiguous(),
        )

    def _closed(self, rule: Rule) -> tuple[int, Tensor | None, Tensor | None]:
        """A rule as (top, threshold [1] or [units], score [units])."""
        match rule:
            case Threshold(values=values, weights=weights):
                threshold = self._floats(torch.as_tensor(values)).reshape(-1)
                return 0, threshold, None if weights is None else self._floats(weights)
            case TopK(count=count, weights=weights):
                return count, None, None if weights is None else self._floats(weights)
            case Fixed(mask=mask):
                return 0, self._floats(torch.where(mask, 0.0, torch.inf)), None
            case _:
                raise NoStepError(f"a rule of kind {type(rule).__name__} runs in the masked path alone")

    def _floats(self, values: Tensor) -> Tensor:
        return values.to(self.weights.device, torch.float32).contiguous()


def _single(threshold: Tensor | None, score: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """One threshold for all units: where each has its own, they become scores against 1."""
    if threshold is None or threshold.numel() == 1:
        return threshold, score
    scale = torch.where(threshold > 0, 1 / threshold, EVERYTHING)
    return torch.ones_like(threshold[:1]), scale if score is None else score * scale


def choose_all(plan: GatePlan, masks: Mapping[int, Bool[Tensor, "batch neurons"]]) -> None:
    """Fill the lists of layers with the neurons that any sequence keeps; in a batch each sequence's own are marked.

    One stacked call for all layers, without waiting for the device. The lists of layers that are missing become empty.
    """
    if not masks or plan.selection is None:
        return
    index = plan.selection.index
    first = next(iter(masks.values()))
    keep = torch.zeros(len(plan.layers), first.shape[1], dtype=torch.bool, device=index.device)
    for layer, mask in masks.items():
        keep[layer] = mask.any(dim=0).to(index.device)
        listed = plan.layers[layer].mlp
        if isinstance(listed, Listed) and listed.mask is not None:
            listed.mask.copy_(mask)
    list_kept(plan.selection, keep)
