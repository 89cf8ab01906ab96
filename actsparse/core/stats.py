"""Small statistics of one sample."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gini(values: Float[Tensor, " n"]) -> float:
    """The Gini coefficient of non-negative values: 0 when all are equal, near 1 when one has everything."""
    ordered = values.double().sort().values
    total = float(ordered.sum())
    if total <= 0 or len(ordered) == 0:
        return 0.0
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    return float((2 * rank - len(ordered) - 1) @ ordered) / (len(ordered) * total)


def median_interval(
    values: Float[Tensor, " n"], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The median of a sample, with the percentile bootstrap interval (low, high) around it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = values.double()[torch.randint(len(values), (resamples, len(values)), generator=generator)]
    medians = torch.quantile(drawn, 0.5, dim=1)
    tail = (1 - level) / 2
    low, high = torch.quantile(medians, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(torch.quantile(values.double(), 0.5)), low, high


def mean_stderr(values: Float[Tensor, " n"], groups: Int[Tensor, " n"] | None = None) -> float | None:
    """The standard error of the mean of values that depend on each other within their group (None: not at all).

    Linearised over whole groups: sqrt(G/(G-1) * sum_g (sum of g's deviations)^2) / n. None of fewer than two groups.
    """
    exact = values.double()
    deviations = exact - exact.mean()
    if groups is not None:
        _, places = groups.unique(return_inverse=True)
        count = int(places.max()) + 1 if len(places) else 0
        deviations = deviations.new_zeros(count).index_add_(0, places.to(deviations.device), deviations)
    count = len(deviations)
    if count < 2:
        return None
    return float((deviations.square().sum() * count / (count - 1)).sqrt()) / len(values)
