"""SI1: does a mask of the first tokens of a text overlap with the masks of later ones? (methods.md section 6)

Our definitions [I], after MOYU (arXiv 2406.12569). Positions count after the sink tokens (the first four), which have
been dropped from every argument.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.bootstrap import RESAMPLES, LayerIntervals, layered_ratio
from actsparse.core.griffin import share_squares
from actsparse.core.overlap import Overlaps, Widths, pairwise_overlaps, topk_masks

PREFIXES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_DELTA = 256
P90_SHARE = 0.9


def prefix_masks(
    activations: Float[Tensor, "positions neurons"], prefixes: Sequence[int], density: float | Sequence[float]
) -> Bool[Tensor, "prefixes neurons"]:
    """The masks m_P of the first P positions, for each P: the top of s_j = sqrt(sum_t (a_tj / ||a_t||)^2 / P_eff).

    That is GRIFFIN's statistic (arXiv 2404.01365); rows that are zero or not finite are skipped. `density` is one for
    all or one a prefix. A unit whose statistic is 0 is never kept. A prefix without usable rows, longer than the
    sequence, or with density 0 gives an empty mask.
    """
    densities = [density] * len(prefixes) if isinstance(density, (int, float)) else list(density)
    exact = activations.double()
    masks = exact.new_zeros(len(prefixes), activations.shape[1], dtype=torch.bool)
    squares, used, end = exact.new_zeros(activations.shape[1]), 0, 0
    for row in sorted(range(len(prefixes)), key=lambda row: prefixes[row]):
        more, rows = share_squares(exact[end : prefixes[row]])
        squares, used, end = squares + more, used + rows, prefixes[row]
        if end <= len(activations) and used > 0 and densities[row] > 0:
            masks[row] = topk_masks((squares / used).sqrt(), densities[row]) & (squares > 0)
    return masks


def mean_densities(
    masks: Bool[Tensor, "positions neurons"], served: Bool[Tensor, " positions"], prefixes: Sequence[int]
) -> list[float]:
    """The mean share of neurons in the masks of those of the first P positions that are served, for each P."""
    sizes = masks.count_nonzero(dim=-1) * served.double() / masks.shape[-1]
    return [float(sizes[:prefix].sum() / served[:prefix].sum().clamp(min=1)) for prefix in prefixes]


def layer_prefix_masks(
    activations: Float[Tensor, "positions units"],
    masks: Bool[Tensor, "positions units"],
    prefixes: Sequence[int],
    density: float | None,
    widths: Widths | None = None,
) -> Bool[Tensor, "prefixes units"]:
    """The masks m_P of a layer: of every group (expert) that served a token of the prefix, by its own tokens alone.

    Each keeps the mean share that the masks of its tokens keep, at most `density`: less than that where fewer units are
    not 0 (ReLU), as its tokens' masks do. Our definition [I].
    """
    groups = widths or (masks.shape[1],)
    rest = (masks.shape[1] - sum(groups),)
    found: list[Tensor] = []
    for part, own in zip(activations.split((*groups, *rest), dim=1), masks.split((*groups, *rest), dim=1), strict=True):
        served = part.isfinite().all(dim=1) & (part != 0).any(dim=1)
        shares = [min(share, density or 1.0) for share in mean_densities(own, served, prefixes)]
        found.append(
            prefix_masks(part, prefixes, shares) if served.any() else own.new_zeros(len(prefixes), own.shape[1])
        )
    return torch.cat(found, dim=1)


def prefix_overlaps(
    activations: Float[Tensor, "positions neurons"],
    masks: Bool[Tensor, "positions neurons"],
    density: float | None,
    *,
    prefixes: Sequence[int] = PREFIXES,
    max_delta: int = MAX_DELTA,
    widths: Widths | None = None,
) -> Overlaps:
    """Overlaps of m_P with the mask of the token `delta` after it, [prefixes, max_delta], of one sequence and layer.

    m_P keeps what `layer_prefix_masks` says. Column d is delta = d + 1, the first token after the prefix being
    delta = 1; NaN beyond the end of the sequence.
    """
    every = pairwise_overlaps(layer_prefix_masks(activations, masks, prefixes, density, widths), masks, widths)
    places = torch.tensor(prefixes)[:, None] + torch.arange(max_delta)
    inside = (places < len(masks)).to(masks.device)
    places = places.clamp(max=len(masks) - 1).to(masks.device)
    return Overlaps(
        overlap=torch.where(inside, every.overlap.gather(1, places), math.nan),
        sizes=every.sizes.gather(1, places[..., None].expand(*places.shape, every.sizes.shape[-1])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCurve:
    """SI1: `curve[k]` is the mean kappa between the mask of the first `prefixes[k]` tokens and later tokens' masks.

    `p90`: the smallest P that reaches 90 % of the largest, per layer, and `p90_mean` of the layers' mean curve; None
    where the curve never rises above 0.
    """

    prefixes: tuple[int, ...]
    curve: tuple[LayerIntervals, ...]
    p90: tuple[int | None, ...]
    p90_mean: int | None


def si1(
    kappas: Float[Tensor, "layers sequences prefixes deltas"],
    *,
    prefixes: Sequence[int] = PREFIXES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PrefixCurve:
    """I(P) = mean over deltas and sequences of kappa(m_P, m_{P+delta}); for I(P, delta) average over sequences alone.

    At most 1; 0: a prefix tells no more than chance (uniform rate) or than the static hot set (popularity rate).
    """
    kappas = kappas.double().cpu()
    sums, counts = kappas.nansum(dim=-1), (~kappas.isnan()).double().sum(dim=-1)
    curve = tuple(
        layered_ratio(sums[..., place], counts[..., place], resamples=resamples, seed=seed)
        for place in range(len(prefixes))
    )
    return PrefixCurve(
        prefixes=tuple(prefixes),
        curve=curve,
        p90=tuple(_p90(prefixes, [point.layers[layer].value for point in curve]) for layer in range(kappas.shape[0])),
        p90_mean=_p90(prefixes, [point.mean.value for point in curve]),
    )


def _p90(prefixes: Sequence[int], values: Sequence[float | None]) -> int | None:
    known = [(prefix, value) for prefix, value in zip(prefixes, values, strict=True) if value is not None]
    top = max((value for _, value in known), default=0.0)
    return next((prefix for prefix, value in known if value >= P90_SHARE * top), None) if top > 0 else None
