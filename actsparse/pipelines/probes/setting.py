"""What every probe gets, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from actsparse.core.bootstrap import Interval, LayerIntervals
from actsparse.core.mask_rules import MaskRule
from actsparse.core.overlap import Chance, Rate, uniform_rate
from actsparse.pipelines.probes.popularity import Popularity
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.text import ProbeTexts
from actsparse.pipelines.progress import Progress
from actsparse.results import Measure, SiteKind, param

# Values of `pop` in a row's param: by uniform chance (left out of the param), or by popularity.
UNIFORM, NATURAL, OWN = None, "nat", "own"


@dataclass(frozen=True)
class Setting:
    """One model, its text and the chance levels of its layers."""

    reader: NeuronReader
    texts: ProbeTexts
    popularity: Popularity
    progress: Progress

    @property
    def layers(self) -> tuple[int, ...]:
        return self.reader.layers

    @property
    def rules(self) -> tuple[MaskRule, ...]:
        return self.reader.rules

    def rates(self, rule: MaskRule) -> dict[str | None, list[Rate]]:
        """The chance level of every layer by the `pop` that names it."""
        widths = self.reader.widths
        uniform: list[Rate] = [uniform_rate(one[0]) if len(one) == 1 else Chance.uniform(one) for one in widths]
        return {UNIFORM: uniform, NATURAL: self.popularity.rates(rule, widths)}


@dataclass
class Found:
    """Rows of `measures.parquet`, and tensors of `probes.safetensors` by name."""

    layers: tuple[int, ...]
    rows: list[Measure] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metric: str, value: float | None, n: int, *, layer: int | None, **where: object) -> None:
        """One row without an interval; NaN is null."""
        known = None if value is None or value != value else value
        self.rows.append(_row(metric, layer, _param(where), known, n))

    def add_interval(self, metric: str, found: Interval, *, layer: int | None, **where: object) -> None:
        """A row with its standard error, and the ends of its interval as `metric_low` and `metric_high`."""
        name = _param(where)
        self.rows.append(_row(metric, layer, name, found.value, found.n, found.stderr))
        self.rows.append(_row(f"{metric}_low", layer, name, found.low, found.n))
        self.rows.append(_row(f"{metric}_high", layer, name, found.high, found.n))

    def add_layers(self, metric: str, found: LayerIntervals, **where: object) -> None:
        """The rows of every layer and of their mean (layer null)."""
        for layer, interval in zip((*self.layers, None), (*found.layers, found.mean), strict=True):
            self.add_interval(metric, interval, layer=layer, **where)

    def add_values(self, metric: str, found: LayerIntervals, **where: object) -> None:
        """As `add_layers`, without intervals."""
        for layer, interval in zip((*self.layers, None), (*found.layers, found.mean), strict=True):
            self.add(metric, interval.value, interval.n, layer=layer, **where)


def _param(where: Mapping[str, object]) -> str:
    return param(**{key: value for key, value in where.items() if value is not None})


def _row(
    metric: str, layer: int | None, where: str, value: float | None, n: int, stderr: float | None = None
) -> Measure:
    return Measure(
        metric=metric, layer=layer, kind=SiteKind.NEURON, param=where, value=value, unit="1", n=n, stderr=stderr
    )
