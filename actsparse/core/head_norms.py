"""Norms of what heads and KV groups add to the residual stream: ||W_u o_u|| of each unit u of a layer's attention.

W_u is the unit's slice of the output projection. Its Gram matrix makes the product with the hidden size unnecessary:
||W_u o||^2 = o^T (W_u^T W_u) o. Where all heads share one KV group (multi-query attention) that matrix would be as
large as the projection, in float32, and save nothing: the group's output is the projection's, and the weights that the
model holds anyway serve.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.row_sums import summed_norms, summed_product_norms


def unit_grams(weight: Float[Tensor, "hidden width"], units: int) -> Float[Tensor, "units part part"]:
    """W_u^T W_u of each of so many equal slices of an output projection, in float32."""
    slices = weight.float().view(weight.shape[0], units, -1)
    return torch.einsum("dui,duj->uij", slices, slices)


@dataclass(frozen=True)
class HeadNorms:
    """What the norms of a layer's heads and KV groups take: `heads` the heads' Gram matrices, `groups` those of the KV
    groups, or the projection [hidden, width] itself, as stored, where there is one group."""

    heads: Float[Tensor, "heads head_dim head_dim"]
    groups: Float[Tensor, "kv_heads part part"] | Float[Tensor, "hidden width"]

    @classmethod
    def of(cls, weight: Float[Tensor, "hidden width"], heads: int, kv_heads: int) -> "HeadNorms":
        """From an output projection [hidden, heads * head_dim]."""
        of_heads = unit_grams(weight, heads)
        if kv_heads == heads:
            return cls(of_heads, of_heads)
        return cls(of_heads, weight if kv_heads == 1 else unit_grams(weight, kv_heads))

    def on(self, device: torch.device) -> "HeadNorms":
        """The same on a device."""
        if self.heads.device == device:
            return self
        heads = self.heads.to(device)
        return HeadNorms(heads, heads if self.groups is self.heads else self.groups.to(device))

    def summed(self, o: Float[Tensor, "tokens width"]) -> tuple[Float[Tensor, " heads"], Float[Tensor, " kv_heads"]]:
        """The norms of heads and of groups, summed over tokens (float64); `o` as `row_sums.numbers` gives it."""
        heads = summed_norms(o, self.heads)
        if self.groups is self.heads:
            return heads, heads
        one_group = self.groups.dim() == 2
        return heads, summed_product_norms(o, self.groups) if one_group else summed_norms(o, self.groups)
