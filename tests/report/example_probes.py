"""Rows and matrices of the probes with planted structure: a static hot set, a token that decides most, no inertia."""

import math

import numpy as np

from actsparse.results import Measure, ModelRecord, param

RUNGS = ("natural", "sentence-shuffled", "token-shuffled", "unigram-random", "uniform-random", "repeat")
CONTROLS = {"identical": 0.0, None: 0.78, "shuffled": 0.71, "random": 0.83, "none": 0.86, "other-token": 0.95}
PAIRS = ("within", "between", "between-apart", "neighbour")
DENSITIES = (0.2, 0.5)
ARMS = {
    ("real", "parallel"): 0.12,
    ("real", "sequential"): 0.13,
    ("random", "parallel"): 0.10,
    ("random", "sequential"): 0.21,
}
FACTORS = {"neuron": 0.2, "sequence": 0.03, "token_type": 0.1, "position": 0.01, "residual": 0.66}


class Rows:
    """Collects rows with their intervals."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.found: list[Measure] = []

    def add(self, metric: str, value: float | None, *, layer: int | None = None, n: int = 8, **where: object) -> None:
        name = param(**{key: part for key, part in where.items() if part is not None})
        self.found.append(Measure(metric=metric, layer=layer, kind="neuron", param=name, value=value, unit="1", n=n))

    def add_interval(
        self, metric: str, value: float | None, half: float, *, layer: int | None = None, n: int = 8, **where: object
    ) -> None:
        self.add(metric, value, layer=layer, n=n, **where)
        for end, sign in (("low", -1), ("high", 1)):
            self.add(f"{metric}_{end}", None if value is None else value + sign * half, layer=layer, n=n, **where)

    def every_layer(
        self, metric: str, value: float, half: float, *, slope: float = 0.0, n: int = 8, **where: object
    ) -> None:
        """The mean over layers and each layer beside it."""
        self.add_interval(metric, value, half, n=n, **where)
        for layer in range(self.layers):
            shifted = value + slope * (layer / max(1, self.layers - 1) - 0.5)
            self.add_interval(metric, shifted, half, layer=layer, n=n, **where)


def measures(model: ModelRecord) -> list[Measure]:
    rows = Rows(model.layers)
    for density in DENSITIES:
        _uncertainty(rows, density)
        _ladder(rows, density)
        _prefix(rows, density)
        _union(rows, density)
    _variance(rows)
    for place in (0.4, 0.6, 0.8):
        rows.every_layer("hu4", 0.5 + place / 2, 0.02, n=8, bin=place)
    rows.every_layer("m2", -0.002, 0.0005, n=8, r=0.2)
    rows.every_layer("m2", -0.001, 0.0005, n=8, exact="true")
    for (text, feed), value in ARMS.items():
        for band in ("early", "middle", "late"):
            rows.add_interval("matrix_2x2", value, 0.02, n=6, text=text, feed=feed, band=band, r=0.2)
            rows.add_interval("matrix_2x2", value - 0.2, 0.02, n=6, text=text, feed=feed, band=band, r=0.2, pop="nat")
    return rows.found


def _uncertainty(rows: Rows, density: float) -> None:
    for pop, shift in ((None, -0.01), ("nat", 0.0)):
        for control, value in CONTROLS.items():
            level = value + shift if value else 0.0
            rows.every_layer("hu1", level, 0.02 if value else 0.0, slope=0.1, n=64, control=control, pop=pop, r=density)
    rows.every_layer("history_share", 0.22, 0.04, n=64, pop="nat", r=density)
    for layer in range(rows.layers):
        rows.add_interval("hu2", 0.80 + 0.1 * layer / rows.layers, 0.03, layer=layer, n=16, r=density)
        rows.add("hu2_shuffled", 1.0, layer=layer, n=16, r=density)


def _ladder(rows: Rows, density: float) -> None:
    for place, rung in enumerate(RUNGS):
        empty = rung == "repeat"
        for metric, above in (("overlap_neighbour", 0.14), ("overlap_w", 0.08), ("overlap_b", 0.06)):
            value = None if empty else density + above * (1 - density)
            rows.add_interval(metric, value, 0.01, r=density, rung=rung)
        for pairs in (None, *PAIRS):
            rows.add("e_uniform", density, r=density, rung=rung, pairs=pairs)
            for pop in ("nat", "own"):
                rows.add("e_pop", density + 0.06 * (1 - density), r=density, rung=rung, pop=pop, pairs=pairs)
        for pop in (None, "nat", "own"):
            rows.add_interval("si2_j", None if empty else 0.02 - 0.003 * place, 0.004, r=density, rung=rung, pop=pop)
    for pop in (None, "nat", "own"):
        rows.add_interval("sir", 0.4, 0.1, r=density, pop=pop)
    for power in range(9):
        rows.add_interval("overlap_distance", density + 0.14 * math.exp(-power / 3), 0.01, r=density, d=2**power)


def _prefix(rows: Rows, density: float) -> None:
    for pop, top in ((None, 0.12), ("nat", 0.02)):
        for power in range(8):
            rows.every_layer("si1", top * (1 - 0.5 ** (power + 1)), 0.01, slope=0.02, p=2**power, pop=pop, r=density)
        rows.add("si1_p90", 16.0, pop=pop, r=density)


def _variance(rows: Rows) -> None:
    for layer in (*range(rows.layers), None):
        for factor, share in {
            "neuron": 0.2,
            "sequence": 0.03,
            "token_type": 0.1,
            "position": 0.01,
            "residual": 0.66,
        }.items():
            rows.add_interval("si3", share, 0.01, layer=layer, n=8, factor=factor)
            if factor != "residual" and layer is not None:
                rows.add("si3_chance", 0.01, layer=layer, n=2016, factor=factor)


def _union(rows: Rows, density: float) -> None:
    for batch in range(1, 65):
        for metric, power in (("union", 0.9), ("union_independent", 0.92), ("union_uniform", 1.0)):
            value = 1 - (1 - density) ** (batch**power)
            if metric == "union" and batch < 38:
                rows.add_interval(metric, value, 0.01, n=38, r=density, b=batch)
            else:
                rows.add(metric, value, n=38 if metric == "union" else 608, r=density, b=batch)


def matrices(sentences: int = 6) -> dict[str, np.ndarray]:
    """`matrix_2x2.TEXT.FEED.r0.2`, [3, K, K], with NaN where a pair has no kappa."""
    random = np.random.default_rng(3)
    found = {}
    for (text, feed), level in ARMS.items():
        grid = np.clip(level + random.normal(0, 0.04, (3, sentences, sentences)), -0.1, 1)
        grid = ((grid + grid.transpose(0, 2, 1)) / 2).astype(np.float32)
        grid[:, 0, 1] = grid[:, 1, 0] = np.nan
        found[f"matrix_2x2.{text}.{feed}.r0.2"] = grid
        found[f"matrix_2x2.{text}.{feed}.r0.2.nat"] = grid - 0.2
    return found
