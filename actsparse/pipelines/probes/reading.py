"""Reading the neurons of a model block by block: one layer at a time in a callback, nothing kept here.

The units of a layer are its neurons, or those of all its experts one after the other (the shared one last); where an
expert does not serve a token, its units are 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.mask_rules import TOPK_RULES, MaskKind, MaskRule
from actsparse.core.overlap import Widths, topk_masks
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.batches import BATCH_TOKENS
from actsparse.pipelines.halving import fitting
from actsparse.results import Site, SiteKind

# What a pass does with one layer: (its place among the recorded layers, activations [batch, seq, units]).
OnLayer = Callable[[int, Tensor], None]

# The same with dL/da [batch, seq, units] beside the activations.
OnGradient = Callable[[int, Tensor, Tensor], None]


# Activations of a layer at once, at most.
WIDE_BYTES = 2**30


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
    """Runs token ids through a model and hands out the activations of the recorded layers.

    `rules` say which masks are measured; `eps` are the CETT thresholds of the FFNs of each layer, for the masks `cett`.
    `widths` are the units of the FFNs of each layer, `units` those of the widest: narrower layers end in zeros.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layers: tuple[int, ...],
        rules: tuple[MaskRule, ...] = TOPK_RULES,
        eps: Sequence[Sequence[float]] = (),
    ) -> None:
        self.loaded = loaded
        self.layers = layers
        self.rules = rules
        self._eps = eps
        ffns = [loaded.sites.layers[layer].ffns for layer in layers]
        self.widths: tuple[Widths, ...] = tuple(tuple(ffn.width for ffn in of_layer) for of_layer in ffns)
        self.units = max(sum(widths) for widths in self.widths)
        self._starts = [
            {ffn.expert: start for ffn, start in zip(of_layer, (0, *accumulate(widths)), strict=False)}
            for of_layer, widths in zip(ffns, self.widths, strict=True)
        ]
        # very wide layers of experts take fewer tokens at once
        self.batch_tokens = min(BATCH_TOKENS, WIDE_BYTES // (4 * self.units))
        self._together = True
        self._down_norms = [[ffn.down_norms() for ffn in of_layer] for of_layer in ffns]

    @property
    def dense(self) -> tuple[bool, ...]:
        """Which recorded layers have one MLP; the others are mixtures of experts."""
        return tuple(len(widths) == 1 for widths in self.widths)

    def batched(self, ids: Int[Tensor, "rows seq"]) -> Iterator[tuple[slice, Int[Tensor, "batch seq"]]]:
        """The rows in batches of at most `batch_tokens` tokens, with where they stand."""
        step = max(1, self.batch_tokens // ids.shape[1])
        for start in range(0, len(ids), step):
            yield slice(start, start + step), ids[start : start + step]

    def shrink(self, batch_tokens: int) -> None:
        """From now on in batches of at most so many tokens, and one by one what was read all at once."""
        self.batch_tokens = batch_tokens
        self._together = False

    def read_all(self, ids: Int[Tensor, "rows seq"], on_layer: OnLayer) -> None:
        """As `read`, for sequences that are compared, so that a layer's activations of all are handed out together.

        Once memory did not suffice (`shrink`) the model runs over one sequence at a time, and anew for every layer,
        since the activations of all layers would take more than what is saved.
        """
        if self._together:
            self.read(ids, on_layer)
            return
        for place, layer in enumerate(self.layers):
            wide = torch.empty(*ids.shape, self.units, device=self._down_norms[place][0].device)
            for row, sequence in zip(wide, ids, strict=True):

                def keep(_place: int, a: Tensor, row: Tensor = row) -> None:
                    row.copy_(a[0])

                self.read(sequence[None], keep, (layer,))
            on_layer(place, wide)

    @torch.no_grad()
    def read(self, ids: Int[Tensor, "batch seq"], on_layer: OnLayer, layers: tuple[int, ...] | None = None) -> None:
        """One forward pass over sequences of equal length; `layers`: of the recorded layers these alone.

        Raises ModelError where memory does not suffice for a single sequence, which no smaller batch would mend.
        """
        open_layer: dict[int, Tensor] = {}

        def close() -> None:
            for place in list(open_layer):
                on_layer(place, open_layer.pop(place))

        def on_value(site: Site, a: Tensor) -> None:
            place = self.layers.index(site.layer)
            if place not in open_layer:
                close()
            self._put(open_layer, place, site.expert, a.detach().float())

        with fitting() if len(ids) == 1 else nullcontext():
            with tapped(self.loaded.sites, {SiteKind.NEURON: on_value}, layers or self.layers):
                self.loaded.model.base_model(input_ids=ids.to(self.loaded.device), use_cache=False)
            close()

    def _put(self, wide: dict[int, Tensor], place: int, expert: int | None, a: Float[Tensor, "*batch neurons"]) -> None:
        """Add the activations of an FFN to those of its layer."""
        if expert is None and a.shape[-1] == self.units:
            wide[place] = a
            return
        if place not in wide:
            wide[place] = a.new_zeros(*a.shape[:-1], self.units)
        start = self._starts[place][expert]
        wide[place][..., start : start + a.shape[-1]] = a

    def read_gradients(self, ids: Int[Tensor, "1 seq"], on_layer: OnGradient) -> None:
        """One forward and one backward pass over a block; L is the sum of the NLL of all its tokens but the first."""
        kept: dict[tuple[int, int | None], Tensor] = {}

        def on_value(site: Site, a: Tensor) -> Tensor:
            # the first recorded layer starts the graph, so that nothing before it, and no weight, costs memory
            kept[site.layer, site.expert] = a if a.requires_grad else a.detach().requires_grad_()
            return kept[site.layer, site.expert]

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
            found = dict(zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True))
        for place, layer in enumerate(self.layers):
            activations: dict[int, Tensor] = {}
            gradients: dict[int, Tensor] = {}
            for at in [at for at in kept if at[0] == layer]:
                self._put(activations, place, at[1], kept[at].detach().float())
                self._put(gradients, place, at[1], found[at].float())
            on_layer(place, activations[place], gradients[place])

    def masks(self, place: int, a: Float[Tensor, "*batch units"], rule: MaskRule) -> Bool[Tensor, "*batch units"]:
        """Masks of one layer by a rule, in each FFN by itself; what is exactly 0 is never active (ReLU)."""
        if rule.kind is MaskKind.EXACT:
            return a != 0
        found = torch.zeros_like(a, dtype=torch.bool)
        starts = (0, *accumulate(self.widths[place]))
        for number, (start, width) in enumerate(zip(starts, self.widths[place], strict=False)):
            scores = a[..., start : start + width].abs() * self._down_norms[place][number]
            kept = scores >= self._eps[place][number] if rule.density is None else topk_masks(scores, rule.density)
            found[..., start : start + width] = kept & (scores > 0)
        return found
