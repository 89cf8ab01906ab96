"""What gates do to the output of one whole layer, measured on the inputs that it has in the dense model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actsparse.engine.gating import SiteValues
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.engine.points import Replaced, visited
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites
from actsparse.models.taps import BlockCall, block_calls
from actsparse.results import Unit


@dataclass(frozen=True)
class LayerErrors:
    """The calls of every layer on a few sequences, kept to be repeated under gates.

    A gate that reads the layer before (`ahead`) cannot be measured here: a layer runs alone.
    """

    sites: ModelSites
    ids: Int[Tensor, "sequences seq"]
    calls: dict[int, list[BlockCall]]
    prompt_length: int
    sink_tokens: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, sites: ModelSites, ids: Int[Tensor, "sequences seq"], *, prompt_length: int, sink_tokens: int
    ) -> "LayerErrors":
        """Run the sequences dense, one by one; the first `prompt_length` positions stay dense later too."""
        with block_calls(sites) as calls:
            for sequence in ids:
                sites.model.base_model(input_ids=sequence[None], use_cache=False)
        return cls(sites, ids, calls, prompt_length, sink_tokens)

    @torch.no_grad()
    def of_layer(self, layer: int, gates: LayerGates) -> Tensor:
        """||Y - Y_mask|| / ||Y|| of the layer's output at every position after the prompts, in float32."""
        return torch.cat([self._of_call(layer, gates, call) for call in self.calls[layer]])

    def mean(self, layer: int, gates: LayerGates) -> float:
        """The mean of `of_layer`."""
        return float(self.of_layer(layer, gates).double().mean())

    @torch.no_grad()
    def kl(self, gates: Sequence[LayerGates]) -> float:
        """Mean KL (dense || sparse) in nats of the model's predictions after the prompts, with every layer's gates at
        work."""
        total, count = 0.0, 0
        for sequence, dense in zip(self.ids, self._log_probs, strict=True):
            plan = MaskedPlan(gates, prompt_length=self.prompt_length, sink_tokens=self.sink_tokens)
            with masked(self.sites, plan):
                sparse = self._predictions(sequence)
            total += float((dense.exp() * (dense - sparse)).sum())
            count += len(dense)
        return total / count

    @cached_property
    def _log_probs(self) -> list[Tensor]:
        return [self._predictions(sequence) for sequence in self.ids]

    @torch.no_grad()
    def _predictions(self, sequence: Int[Tensor, " seq"]) -> Float[Tensor, "positions vocab"]:
        kept = len(sequence) - self.prompt_length
        logits = self.sites.model(input_ids=sequence[None], use_cache=False, logits_to_keep=kept).logits[0]
        return logits.float().log_softmax(dim=-1)

    def _of_call(self, layer: int, gates: LayerGates, call: BlockCall) -> Tensor:
        every = [gates if one.index == layer else LayerGates() for one in self.sites.layers]
        plan = MaskedPlan(every, prompt_length=self.prompt_length, sink_tokens=self.sink_tokens)

        def visit(unit: Unit, at: int, x: Tensor, values: SiteValues) -> Replaced | None:
            return plan.replaced(unit, at, x, values, 0)

        with visited(self.sites, [every], visit, (layer,)):
            sparse = call.again(self.sites.layers[layer])
        dense = call.output[0, self.prompt_length :].float()
        change = (dense - sparse[0, self.prompt_length :].float()).norm(dim=-1)
        norms = dense.norm(dim=-1)
        return torch.where(norms > 0, change / norms, 0.0)
