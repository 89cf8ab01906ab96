"""What methods are fitted from: statistics of calibration text, and its blocks replayed dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from actsparse.core.quantiles import LogHistogram, quantile_of, share_below
from actsparse.data.sequences import Sequences
from actsparse.methods.base import NeuronMeans
from actsparse.methods.gates import LayerGates, Statistic
from actsparse.models.load import LoadedModel
from actsparse.models.shape import HeadShape, shape_of
from actsparse.pipelines.calibration_statistics import Statistics
from actsparse.pipelines.channel_replay import ChannelReplay
from actsparse.pipelines.probing import probe
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.recording import record_sequences
from actsparse.pipelines.replay import Replay
from actsparse.pipelines.training import NO_CHECKPOINTS, Checkpoints, TrainingReplay
from actsparse.results import SHARED_EXPERT, FfnPlace, Site, SiteKind, Unit, ffn_places


@dataclass(frozen=True)
class TextCalibration:
    """The calibration of methods: statistics and replays, each made when first asked for."""

    widths: tuple[int, ...]
    make_statistics: Callable[[], Statistics]
    make_replay: Callable[[], Replay]
    checkpoints: Checkpoints = NO_CHECKPOINTS
    places: tuple[FfnPlace, ...] = ()

    @property
    def ffns(self) -> tuple[FfnPlace, ...]:
        return self.places or ffn_places(len(self.widths), self.widths[0], None)

    @cached_property
    def _statistics(self) -> Statistics:
        return self.make_statistics()

    @cached_property
    def _replay(self) -> Replay:
        return self.make_replay()

    @property
    def attention(self) -> HeadShape:
        return shape_of(self._replay.loaded.model.config)

    def output_matrix(self, layer: int) -> Tensor:
        return self._replay.loaded.sites.layers[layer].output_matrix(self.attention.heads * self.attention.head_dim)

    def means(self, layer: int) -> NeuronMeans:
        return self._statistics.means[layer]

    def quantile(self, layer: int, kind: SiteKind, share: float) -> float:
        return quantile_of(*self._statistics.histograms[self._site(layer, kind)], share)

    def share_below(self, layer: int, kind: SiteKind, threshold: float) -> float:
        return share_below(*self._statistics.histograms[self._site(layer, kind)], threshold)

    def _site(self, place: int, kind: SiteKind) -> Site:
        """Where an FFN is counted: routed experts together with those of their layer."""
        ffn = self.ffns[place]
        return Site(layer=ffn.layer, kind=kind, expert=SHARED_EXPERT if ffn.expert == SHARED_EXPERT else None)

    def down_norms(self, layer: int) -> Tensor:
        return self._replay.down_norms(layer)

    def magnitudes(self, kind: SiteKind, weights: Sequence[Tensor]) -> list[LogHistogram]:
        return self._replay.magnitudes(kind, weights)

    def pooled(self, kind: SiteKind, statistics: Sequence[Statistic]) -> list[Tensor]:
        return self._replay.pooled(kind, statistics)

    def pooled_attention(self, statistics: Sequence[Statistic]) -> list[Tensor]:
        return self._replay.pooled_attention(statistics)

    def prompts(self) -> Replay:
        return self._replay

    def local_errors(self, gates: Sequence[LayerGates]) -> list[float]:
        replay = self._replay
        what = "measuring errors on calibration text"
        found = probe(replay.loaded, gates, replay.blocks, replay.prompt_length, what, replay.progress)
        return [found.tally(Unit.NEURON, layer).mean_error for layer in range(len(gates))]

    def channels(self) -> ChannelReplay:
        return self._channels

    @cached_property
    def _channels(self) -> ChannelReplay:
        return ChannelReplay(self._replay.loaded, self._replay.blocks, self._replay.progress)

    def training(self) -> TrainingReplay:
        replay = self._replay
        return TrainingReplay(replay.loaded, replay.blocks, replay.progress, self.checkpoints)


def of_blocks(
    loaded: LoadedModel,
    blocks: Sequences,
    prompt_length: int,
    progress: Progress,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> TextCalibration:
    """A calibration on blocks: recorded and replayed only as far as a method asks; trained parts that are finished are
    kept in `checkpoints`."""

    def statistics() -> Statistics:
        state = record_sequences(
            loaded,
            blocks,
            layers=tuple(range(loaded.record.layers)),
            kinds=(SiteKind.GATE, SiteKind.UP, SiteKind.NEURON),
            slots=1,
            seed=0,
            batch_size=None,
            what="calibration statistics",
            progress=progress,
        )
        return Statistics.of_state(state, loaded)

    return TextCalibration(
        loaded.record.ffn_widths,
        statistics,
        lambda: Replay(loaded, blocks, prompt_length, progress),
        checkpoints,
        loaded.record.ffns,
    )
