"""Reading the neurons of a model block by block: one layer at a time in a callback, nothing kept here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.mask_rules import TOPK_RULES, MaskKind, MaskRule
from actsparse.core.overlap import topk_masks
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.batches import BATCH_TOKENS
from actsparse.results import Site, SiteKind

# What a pass does with one layer: (its place among the recorded layers, activations [batch, seq, neurons]).
OnLayer = Callable[[int, Tensor], None]

# The same with dL/da [batch, seq, neurons] beside the activations.
OnGradient = Callable[[int, Tensor, Tensor], None]


@contextmanager
def without_weight_gradients(model: torch.nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the block runs."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class NeuronReader:
    """Runs token ids through a model and hands out the neuron activations of the recorded layers.

    `rules` say which masks are measured; `eps` [layers] are the CETT thresholds of the layers, for the masks `cett`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layers: tuple[int, ...],
        rules: tuple[MaskRule, ...] = TOPK_RULES,
        eps: Sequence[float] = (),
    ) -> None:
        self.loaded = loaded
        self.batch_tokens = BATCH_TOKENS
        self.layers = layers
        self.rules = rules
        self._eps = tuple(eps)
        self.neurons = loaded.record.intermediate_size
        self._down_norms = [loaded.sites.layers[layer].down_norms(self.neurons) for layer in layers]

    def batched(self, ids: Int[Tensor, "rows seq"]) -> Iterator[tuple[slice, Int[Tensor, "batch seq"]]]:
        """The rows in batches of at most `batch_tokens` tokens, with where they stand."""
        step = max(1, self.batch_tokens // ids.shape[1])
        for start in range(0, len(ids), step):
            yield slice(start, start + step), ids[start : start + step]

    @torch.no_grad()
    def read(self, ids: Int[Tensor, "batch seq"], on_layer: OnLayer) -> None:
        """One forward pass over sequences of equal length."""

        def on_value(site: Site, a: Tensor) -> None:
            on_layer(self.layers.index(site.layer), a.detach().float())

        with tapped(self.loaded.sites, {SiteKind.NEURON: on_value}, self.layers):
            self.loaded.model.base_model(input_ids=ids.to(self.loaded.device), use_cache=False)

    def read_gradients(self, ids: Int[Tensor, "1 seq"], on_layer: OnGradient) -> None:
        """One forward and one backward pass over a block; L is the sum of the NLL of all its tokens but the first."""
        kept: dict[int, Tensor] = {}

        def on_value(site: Site, a: Tensor) -> Tensor:
            # the first recorded layer starts the graph, so that nothing before it, and no weight, costs memory
            kept[site.layer] = a if a.requires_grad else a.detach().requires_grad_()
            return kept[site.layer]

        with (
            torch.enable_grad(),
            without_weight_gradients(self.loaded.model),
            tapped(self.loaded.sites, {SiteKind.NEURON: on_value}, self.layers),
        ):
            ids = ids.to(self.loaded.device)
            logits = self.loaded.model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum"
            )
            found = torch.autograd.grad(loss, [kept[layer] for layer in self.layers])
        for place, (layer, gradient) in enumerate(zip(self.layers, found, strict=True)):
            on_layer(place, kept[layer].detach().float(), gradient.float())

    def masks(self, place: int, a: Float[Tensor, "*batch neurons"], rule: MaskRule) -> Bool[Tensor, "*batch neurons"]:
        """Masks of one layer by a rule; a neuron that is exactly 0 is never active (ReLU)."""
        if rule.kind is MaskKind.EXACT:
            return a != 0
        scores = a.abs() * self._down_norms[place]
        if rule.density is None:
            return (scores >= self._eps[place]) & (scores > 0)
        return topk_masks(scores, rule.density) & (scores > 0)
