"""Projections that read only the rows and columns of kept neurons. Works on any family: what is sliced is the linear.

During prefill a layer runs dense; `keep` then gathers the weights of the kept neurons into compact copies, which every
decode step reads instead of the whole matrices.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from actsparse.models.projections import dense_weight
from actsparse.models.sites import LayerSites, ModelSites


class SlicedLinear(nn.Module):
    """A projection that runs whole until it is told which of its units to read.

    `rows`: units are outputs (gate, up), else inputs (down). `blocks` is 2 for a fused gate_up, whose kept rows are
    taken from both halves.
    """

    def __init__(self, whole: nn.Module, *, rows: bool, transposed: bool, blocks: int = 1) -> None:
        super().__init__()
        self.whole = whole
        self.rows = rows
        self.blocks = blocks
        self._weight, self._bias = dense_weight(whole, transposed, type(whole).__name__)
        # rows of the transposed matrix are contiguous: gathering columns of the original is an order slower
        self._units = self._weight.detach() if rows else self._weight.detach().t().contiguous()
        self._part: Tensor | None = None
        self._part_bias: Tensor | None = None
        self.sparse = False

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not self.sparse or self._part is None:
            return self.whole(x)
        if self.rows:
            return F.linear(x, self._part, self._part_bias)
        return F.linear(x, self._part.t(), self._bias)

    @property
    def units(self) -> int:
        """Units that can be kept or left out."""
        return self._units.shape[0] // self.blocks

    @property
    def device(self) -> torch.device:
        return self._units.device

    @torch.no_grad()
    def keep(self, units: Int[Tensor, " kept"]) -> bool:
        """Gather these units, which are read while `sparse` is set; whether they got another buffer than those before.

        As many units as before keep their buffer, so that a captured step reads the new ones.
        """
        stride = self._units.shape[0] // self.blocks
        chosen = torch.cat([units + block * stride for block in range(self.blocks)])
        moved = self._part is None or len(self._part) != len(chosen)
        if moved:
            self._part = self._units.new_empty(len(chosen), self._units.shape[1])
        torch.index_select(self._units, 0, chosen, out=self._part)
        if self.rows and self._bias is not None:
            bias = self._bias.detach()
            if moved:
                self._part_bias = bias.new_empty(len(chosen))
            torch.index_select(bias, 0, chosen, out=self._part_bias)
        return moved


class SlicedMlps:
    """The sliceable projections of every layer of a model."""

    def __init__(self, layers: list[list[SlicedLinear]]) -> None:
        self._layers = layers
        self.version = 0
        """Another one after every `keep` for which buffers had to move."""

    @property
    def neurons(self) -> int:
        """Neurons of a layer."""
        return self._layers[0][-1].units

    def keep(self, masks: list[Bool[Tensor, " neurons"]]) -> None:
        """Gather the weights of the kept neurons of every layer, and run sparse."""
        moved = False
        for linears, mask in zip(self._layers, masks, strict=True):
            units = mask.nonzero().squeeze(1)
            for linear in linears:
                moved |= linear.keep(units.to(linear.device))
        self.version += moved
        self.sparse()

    def sparse(self) -> None:
        """Read kept neurons only."""
        self._switch(True)

    def dense(self) -> None:
        """Read whole matrices."""
        self._switch(False)

    def _switch(self, sparse: bool) -> None:
        for linears in self._layers:
            for linear in linears:
                linear.sparse = sparse


@contextmanager
def sliceable(sites: ModelSites) -> Iterator[SlicedMlps]:
    """Replace the MLP projections of every layer by sliceable ones while the block runs, then put them back."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        yield SlicedMlps([_replace_layer(layer, replaced) for layer in sites.layers])
    finally:
        for parent, name, original in reversed(replaced):
            setattr(parent, name, original)
        _forget(sites)


def _replace_layer(layer: LayerSites, replaced: list[tuple[nn.Module, str, nn.Module]]) -> list[SlicedLinear]:
    row, _ = layer.family, layer.linears  # sites must know their own modules before others stand in their place
    names = dict.fromkeys(name for name in (row.gate, row.up, row.down) if name)
    sliced = []
    for name in names:
        whole = getattr(layer.mlp, name)
        linear = SlicedLinear(
            whole,
            rows=name != row.down,
            transposed=row.transposed,
            blocks=2 if row.fused_gate_up and name == row.up else 1,
        )
        setattr(layer.mlp, name, linear)
        replaced.append((layer.mlp, name, whole))
        sliced.append(linear)
    return sliced


def _forget(sites: ModelSites) -> None:
    """Drop compiled forwards that were made with other modules in place."""
    sites.model.__dict__.pop("_compiled_call", None)
