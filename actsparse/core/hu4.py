"""HU4, the recursion of MOYU (arXiv 2406.12569): does what mattered so far tell what matters now?

    Theta_i(t) = |a_i dL_t/da_i| + Theta_i(t-1)

The recursion is the paper's [A]; the measure on it is ours [I].
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from actsparse.core.bootstrap import RESAMPLES, LayerIntervals, layered_ratio

DIVERSITY_BINS = 5


def theta_uncertainty(salience: Float[Tensor, "positions neurons"]) -> Float[Tensor, " positions"]:
    """HU4(t) = 1 - Spearman over neurons of Theta(t-1) with g(t), where Theta(t) = g(t) + Theta(t-1).

    `salience` is g_i(t) = |a_i dL/da_i| of one layer and block, L the sum of the block's NLL. 0: what mattered so far
    ranks what matters now exactly; 1: it tells nothing; up to 2: the reverse. NaN at the first position, and where
    either is constant (the last position has no loss of its own). MOYU's recursion [A]; the measure is ours [I].
    """
    current = salience.double().cpu().numpy()
    before = np.zeros_like(current)
    np.cumsum(current[:-1], axis=0, out=before[1:])
    left, right = (_standard_ranks(part) for part in (before, current))
    return torch.from_numpy(1 - (left * right).sum(axis=1))


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks within each row, centred and of unit norm, so that a product of two rows is Spearman's rho."""
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, norms, out=np.full_like(ranks, np.nan), where=norms > 0)


def token_diversity(tokens: Int[Tensor, " positions"]) -> Float[Tensor, " positions"]:
    """Distinct over total token ids in 0..t, for every t of a block, sink positions included; above 0, at most 1."""
    ids = tokens.cpu().numpy()
    new = np.zeros(len(ids))
    new[np.unique(ids, return_index=True)[1]] = 1
    return torch.from_numpy(new.cumsum() / np.arange(1, len(ids) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityBin:
    """HU4 at the `tokens` positions whose diversity lies in [low, high) (the last bin includes 1)."""

    low: float
    high: float
    uncertainty: LayerIntervals
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThetaUncertainty:
    uncertainty: LayerIntervals
    bins: tuple[DiversityBin, ...]


def hu4(
    values: Float[Tensor, "layers blocks positions"],
    diversity: Float[Tensor, "blocks positions"],
    *,
    bins: int = DIVERSITY_BINS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ThetaUncertainty:
    """The mean of HU4(t) over tokens, and in `bins` equal steps of diversity from 0 to 1; blocks are resampled.

    `values` come from `theta_uncertainty`, `diversity` from `token_diversity` at the same positions.
    """
    values = values.double().cpu()
    valid = ~values.isnan()
    filled = values.nan_to_num(0.0)
    places = (diversity.cpu() * bins).long().clamp(max=bins - 1)

    def over(members: Tensor) -> LayerIntervals:
        chosen = valid & members
        return layered_ratio((filled * chosen).sum(-1), chosen.double().sum(-1), resamples=resamples, seed=seed)

    return ThetaUncertainty(
        uncertainty=over(torch.ones_like(places, dtype=torch.bool)),
        bins=tuple(
            DiversityBin(
                low=place / bins,
                high=(place + 1) / bins,
                uncertainty=over(places == place),
                tokens=int((places == place).sum()),
            )
            for place in range(bins)
        ),
    )
