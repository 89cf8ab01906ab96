"""Calibration text run through the projections of every layer: scores of their inputs, and errors of whole layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from actsparse.core.quantiles import ExactQuantile, LogHistogram
from actsparse.data.sequences import Sequences
from actsparse.engine.layer_error import LayerErrors
from actsparse.methods.channel_replay import Found, Place
from actsparse.methods.gates import LayerGates, weighed
from actsparse.models.load import LoadedModel
from actsparse.models.sites import dense_linears
from actsparse.models.taps import projections_tapped
from actsparse.pipelines.progress import Progress
from actsparse.results import StepBytes, Unit

SAME_INPUT = {Unit.K: Unit.Q, Unit.V: Unit.Q, Unit.UP: Unit.GATE}
"""Projections that read what another one reads."""
ERROR_SEQUENCES, ERROR_LENGTH, ERROR_PROMPT = 2, 192, 48


@dataclass(frozen=True)
class ChannelReplay:
    """Dense runs over calibration blocks; `methods.channels.ChannelReplay` says what each answer is."""

    loaded: LoadedModel
    blocks: Sequences
    progress: Progress

    @property
    def layers(self) -> int:
        return len(self.loaded.sites.layers)

    @property
    def widths(self) -> dict[Unit, int]:
        return {unit: width for unit, (width, _) in self._shapes.items()}

    @property
    def sizes(self) -> dict[Unit, int]:
        return {unit: size for unit, (_, size) in self._shapes.items()}

    @cached_property
    def _shapes(self) -> dict[Unit, tuple[int, int]]:
        return {unit: (one.width, one.matrix().numel()) for unit, one in dense_linears(self.loaded.sites).items()}

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def matrix(self, layer: int, unit: Unit) -> Tensor:
        return self.loaded.sites.layers[layer].projections[unit].matrix().float()

    def scores(self, weights: Mapping[Place, Tensor]) -> dict[Place, LogHistogram]:
        return self._scores(weights) if weights else self.kept("plain scores", lambda: self._scores({}))

    def _scores(self, weights: Mapping[Place, Tensor]) -> dict[Place, LogHistogram]:
        found = {place: LogHistogram() for place in self._places if self._reads_itself(place, weights)}
        self._run("scoring channels", lambda place, x: found[place].add(x), found, weights)
        return {place: found[self._counted_as(place, weights)] for place in self._places}

    def mean_magnitudes(self) -> dict[Place, Tensor]:
        return self.kept("mean magnitudes", self._mean_magnitudes)

    def _mean_magnitudes(self) -> dict[Place, Tensor]:
        read = [place for place in self._places if self._reads_itself(place, {})]
        totals = {place: torch.zeros(self.widths[place[1]], dtype=torch.float64) for place in read}
        tokens = dict.fromkeys(read, 0)

        def add(place: Place, x: Tensor) -> None:
            totals[place] += x.double().sum(dim=0).cpu()
            tokens[place] += len(x)

        self._run("reading channels", add, read, {})
        return {place: totals[one] / tokens[one] for place in self._places for one in [self._counted_as(place, {})]}

    def quantiles(
        self, scores: Mapping[Place, LogHistogram], weights: Mapping[Place, Tensor], shares: Mapping[Place, float]
    ) -> dict[Place, tuple[float, float]]:
        exact = {place: ExactQuantile.of(scores[place], share) for place, share in shares.items()}
        self._run("fitting thresholds", lambda place, x: exact[place].add(x), exact, weights)
        return {place: one.solve() for place, one in exact.items()}

    def covariance(self, unit: Unit) -> list[Tensor]:
        width = self.widths[unit]
        found = [torch.zeros(width, width, dtype=torch.float64) for _ in range(self.layers)]
        tokens = [0] * self.layers

        def add(place: Place, x: Tensor) -> None:
            found[place[0]] += (x.T @ x).double().cpu()
            tokens[place[0]] += len(x)

        self._run("reading covariances", add, [(layer, unit) for layer in range(self.layers)], {}, signed=True)
        return [one / count for one, count in zip(found, tokens, strict=True)]

    @property
    def step(self) -> StepBytes:
        return self.loaded.record.step

    def kl(self, gates: Sequence[LayerGates]) -> float:
        return self._errors.kl(gates)

    def kept(self, key: str, make: Callable[[], Found]) -> Found:
        if key not in self._kept:
            self._kept[key] = make()
        return cast(Found, self._kept[key])

    @cached_property
    def _kept(self) -> dict[str, object]:
        return {}

    def block_error(self, layer: int, gates: LayerGates) -> float:
        return self._errors.mean(layer, gates)

    def each_layer(self, what: str) -> Iterator[int]:
        with self.progress.task(what, self.layers, "layers") as advance:
            for layer in range(self.layers):
                yield layer
                advance(1)

    @cached_property
    def _errors(self) -> LayerErrors:
        chosen = self.blocks.stack()[:ERROR_SEQUENCES, :ERROR_LENGTH].to(self.loaded.device)
        prompt = min(max(ERROR_PROMPT, self._sink), chosen.shape[1] // 2)
        return LayerErrors.of(self.loaded.sites, chosen, prompt_length=prompt, sink_tokens=self._sink)

    @property
    def _places(self) -> list[Place]:
        return [(layer, unit) for layer in range(self.layers) for unit in self.widths]

    @property
    def _sink(self) -> int:
        return self.blocks.record.sink_tokens

    def _reads_itself(self, place: Place, weights: Mapping[Place, Tensor]) -> bool:
        return self._counted_as(place, weights) == place

    def _counted_as(self, place: Place, weights: Mapping[Place, Tensor]) -> Place:
        """The projection whose scores are the same, where they have no weights of their own."""
        same = SAME_INPUT.get(place[1])
        return (place[0], same) if same in self.widths and place not in weights and same else place

    def _run(
        self,
        what: str,
        on_scores: Callable[[Place, Tensor], None],
        places: Mapping[Place, object] | Sequence[Place],
        weights: Mapping[Place, Tensor],
        *,
        signed: bool = False,
    ) -> None:
        """One dense pass over every block: the scores (or the inputs, `signed`) of these projections after the sink
        tokens."""

        def on_input(layer: int, unit: Unit, x: Tensor) -> None:
            if (layer, unit) in places:
                rows = x[0, self._sink :]
                on_scores((layer, unit), rows.float() if signed else weighed(rows, weights.get((layer, unit))).float())

        ids = self.blocks.stack()
        units = {unit for _, unit in places}
        with (
            self.progress.task(what, ids.numel(), "tokens") as advance,
            projections_tapped(self.loaded.sites, units, on_input),
            torch.no_grad(),
        ):
            for block in ids:
                self.loaded.model.base_model(input_ids=block[None].to(self.loaded.device), use_cache=False)
                advance(len(block))
