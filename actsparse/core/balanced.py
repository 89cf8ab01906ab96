"""Balanced clustering: equal groups of rows, by k-means whose assignment is exact (MoE-fication, arXiv 2110.01786).

The assignment of n rows to E groups of given sizes at least total squared distance is a transport problem. POT solves
it by network simplex, exactly and in seconds for the 11,008 neurons of a 7B model; the same as a linear assignment over
repeated centroids takes minutes there, and greedy filling is not optimal.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ITERATIONS = 20
SIMPLEX_STEPS = 10_000_000


def group_sizes(rows: int, size: int) -> list[int]:
    """Sizes of the groups: as many of `size` as there are, and a last smaller one where `rows` is no multiple."""
    full, rest = divmod(rows, size)
    return [size] * full + ([rest] if rest else [])


def balanced_kmeans(
    rows: Float[Tensor, "rows width"], sizes: list[int], seed: int
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "groups width"]]:
    """The group of every row, and the mean of every group; group g has `sizes[g]` rows.

    Starts at seeded k-means++ centres and alternates exact assignment and means until no row moves, or ITERATIONS.
    Deterministic under a seed. Raises ValueError where the sizes do not add up to the rows.
    """
    if sum(sizes) != len(rows):
        raise ValueError(f"{len(sizes)} groups of {sum(sizes)} rows in all cannot hold {len(rows)} rows")
    points = rows.detach().double().cpu().numpy()
    centres = _first_centres(points, len(sizes), seed)
    groups = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        assigned = assign(points, centres, sizes)
        if np.array_equal(assigned, groups):
            break
        groups = assigned
        centres = _means(points, groups, len(sizes))
    return torch.from_numpy(groups), torch.from_numpy(centres).to(rows.dtype)


def assign(points: np.ndarray, centres: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The group of every point [rows], of least total squared distance to the centres under the given sizes."""
    from ot.lp import emd

    if len(sizes) == 1:
        return np.zeros(len(points), dtype=np.int64)
    cost = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
    plan = emd(np.ones(len(points)), np.asarray(sizes, dtype=np.float64), cost, numItermax=SIMPLEX_STEPS)
    groups = np.asarray(plan).argmax(axis=1)
    if not np.array_equal(np.bincount(groups, minlength=len(sizes)), sizes):
        raise ValueError("the balanced assignment did not converge: are all rows finite?")
    return groups


def _first_centres(points: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): each centre drawn in proportion to the squared distance from those
    before it."""
    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    for _ in range(groups - 1):
        total = nearest.sum()
        share = nearest / total if total > 0 else None
        chosen.append(int(generator.choice(len(points), p=share)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
    return points[chosen]


def _means(points: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros((count, points.shape[1]))
    np.add.at(sums, groups, points)
    return sums / np.bincount(groups, minlength=count)[:, None]
