"""What methods are fitted from: statistics of calibration text, and its blocks replayed dense."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from actsparse.core.cett import CettLayer, CettPoint
from actsparse.core.quantiles import LogHistogram, quantile_of, share_below
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import relative_errors
from actsparse.errors import PlanError
from actsparse.methods.base import NeuronMeans
from actsparse.methods.gates import LayerGates, Statistic
from actsparse.methods.prompt_statistic import PromptReading
from actsparse.models.load import LoadedModel
from actsparse.models.shape import HeadShape, shape_of
from actsparse.models.taps import Tap, tapped
from actsparse.pipelines.channel_replay import ChannelReplay
from actsparse.pipelines.probing import probe
from actsparse.pipelines.profile_state import ProfileState
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.recording import record_sequences
from actsparse.pipelines.training import NO_CHECKPOINTS, Checkpoints, TrainingReplay
from actsparse.results import SHARED_EXPERT, FfnPlace, ModelRecord, Site, SiteKind, Unit, ffn_places
from actsparse.store.runs import ProfileRun

REPLAY_BYTES = 512 * 2**20
WHOLE_PROMPT = PromptReading()


@dataclass(frozen=True)
class Statistics:
    """Means of every layer, and quantiles of magnitudes at its sites."""

    means: tuple[NeuronMeans, ...]
    histograms: dict[Site, tuple[Tensor, Tensor]]

    @classmethod
    def of_run(cls, run: ProfileRun) -> "Statistics":
        """From the tables of a profile; raises PlanError where it did not record every layer."""
        model = run.manifest.model
        recorded = run.neurons["layer"].n_unique()
        if model is None or recorded != model.layers:
            raise PlanError(
                f"the profile at {run.path} recorded {recorded} layers only", "profile the model without --layers"
            )
        means = []
        # rows of a layer stand in the order of its FFNs: its MLP, or its experts and the shared one
        for _, rows in run.neurons.group_by("layer", "expert", maintain_order=True):
            columns = [field.name for field in fields(NeuronMeans)]
            ordered = rows.sort("neuron")
            means.append(NeuronMeans(**{name: torch.from_numpy(ordered[name].to_numpy().copy()) for name in columns}))
        histograms = {
            Site.named(int(layer), kind): (
                torch.from_numpy(run.histograms[f"layers.{layer}.{kind}.counts"]),
                torch.from_numpy(run.histograms[f"layers.{layer}.{kind}.edges"]),
            )
            for name in run.histograms
            if name.endswith(".counts")
            for _, layer, kind, _ in [name.split(".")]
        }
        return cls(tuple(means), histograms)

    @classmethod
    def of_state(cls, state: ProfileState, loaded: LoadedModel) -> "Statistics":
        """From a recording in memory."""
        means = []
        for place, sums in state.neurons.items():
            norms = loaded.sites.ffns[place].down_norms()
            tokens = max(1, sums.tokens)
            means.append(
                NeuronMeans(
                    mean=sums.total / tokens,
                    mean_norm=sums.total_abs / tokens * norms.double().cpu(),
                    griffin=(sums.share_square / max(1, sums.rows)).sqrt(),
                    mean_square_up=sums.square_up / tokens,
                )
            )
        return cls(tuple(means), {site: moments.histogram.trimmed() for site, moments in state.moments.items()})


@dataclass(frozen=True)
class Replay:
    """Calibration blocks run dense again. Every question runs them once, when it is first asked."""

    loaded: LoadedModel
    blocks: Sequences
    prompt_length: int
    progress: Progress

    @classmethod
    def of(cls, loaded: LoadedModel, blocks: Sequences, prompt_length: int, progress: Progress) -> "Replay":
        """Blocks of equal length, of which the first `prompt_length` positions are the prompt."""
        return cls(loaded, blocks, prompt_length, progress)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt after the sink tokens."""
        return self.prompt_length - self._sink

    @property
    def block_tokens(self) -> int:
        """Tokens of a block after the sink tokens."""
        return len(self.blocks.ids[0]) - self._sink

    def statistics(self, layer: int, reading: PromptReading = WHOLE_PROMPT, tokens: int | None = None) -> Tensor:
        """The prompt statistic of every block [blocks, neurons], over its first `tokens` tokens after the sink tokens
        (None: its prompt)."""
        stop = self._sink + (self.prompt_tokens if tokens is None else tokens)
        if (reading, stop) not in self._statistics:
            self._statistics[reading, stop] = self._read_prompts(reading, stop)
        return self._statistics[reading, stop][layer]

    def _read_prompts(self, reading: PromptReading, stop: int) -> list[Tensor]:
        norms = [self.down_norms(i) if reading.source == "n" else None for i in range(self.loaded.record.layers)]
        found: list[list[Tensor]] = [[] for _ in norms]

        def on_value(site: Site, a: Tensor) -> None:
            statistic = reading.statistic(norms[site.layer])
            statistic.add(a[0, self._sink :])
            found[site.layer].append(statistic.value().cpu())

        self._run("reading calibration prompts", reading.site, on_value, stop)
        return [torch.stack(rows) for rows in found]

    @cached_property
    def continuations(self) -> tuple[Tensor, ...]:
        """[layers] of [blocks, positions, neurons] at positions P..S-1, see `_sampled`."""
        return self._sampled(self.prompt_length)

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """[layers] of [blocks, positions, neurons] at every position after the sink tokens, see `_sampled`."""
        return self._sampled(self._sink)

    def _sampled(self, first: int) -> tuple[Tensor, ...]:
        """Neuron activations from position `first` on, at every position or every n-th, so that all layers stay within
        512 MB."""
        shape = self.loaded.record
        block_length = len(self.blocks.ids[0])
        per_position = len(self.blocks) * shape.intermediate_size * shape.layers * self.loaded.model.dtype.itemsize
        stride = -(-(block_length - first) // max(1, REPLAY_BYTES // per_position))
        found: list[list[Tensor]] = [[] for _ in range(shape.layers)]

        def on_value(site: Site, a: Tensor) -> None:
            found[site.layer].append(a[0, first::stride].cpu())

        self._run("replaying calibration blocks", SiteKind.NEURON, on_value, block_length)
        return tuple(torch.stack(rows) for rows in found)

    def magnitudes(self, kind: SiteKind, weights: Sequence[Tensor]) -> list[LogHistogram]:
        """[ffns] histograms of |x_i| * weights_i over every position after the sink tokens; the routed experts of a
        layer share one."""
        sites, pooled = self.loaded.sites, dict[tuple[int, bool], LogHistogram]()
        found = [
            pooled.setdefault((ffn.layer.index, ffn.expert == SHARED_EXPERT), LogHistogram()) for ffn in sites.ffns
        ]

        def on_value(site: Site, x: Tensor) -> None:
            place = sites.ffn_index[site.layer, site.expert]
            rows = x[0, self._sink :]
            if self._tap.routed is not None:
                rows = rows[self._tap.routed[0, self._sink :]]
            found[place].add(rows.float() * weights[place].to(x.device))

        self._run("weighing calibration activations", kind, on_value, len(self.blocks.ids[0]))
        return found

    def pooled(self, kind: SiteKind, statistics: Sequence[Statistic]) -> list[Tensor]:
        """See `methods.base.Calibration`; an expert sees the tokens routed to it (0 everywhere where there are
        none)."""
        sites, seen = self.loaded.sites, set[int]()

        def on_value(site: Site, x: Tensor) -> None:
            rows = x[0, self._sink :]
            if self._tap.routed is not None:
                rows = rows[self._tap.routed[0, self._sink :]]
            if len(rows):
                place = sites.ffn_index[site.layer, site.expert]
                statistics[place].add(rows)
                seen.add(place)

        self._run("reading calibration text", kind, on_value, len(self.blocks.ids[0]))
        widths = widths_of(self.loaded.record)
        return [
            one.value().cpu() if place in seen else torch.zeros(widths[place], dtype=torch.float64)
            for place, one in enumerate(statistics)
        ]

    def pooled_attention(self, statistics: Sequence[Statistic]) -> list[Tensor]:
        """See `methods.base.Calibration`."""

        def on_value(site: Site, x: Tensor) -> None:
            statistics[site.layer].add(x[0, self._sink :])

        self._run("reading heads", SiteKind.ATTN_OUT, on_value, len(self.blocks.ids[0]))
        return [one.value().cpu() for one in statistics]

    def _run(self, what: str, kind: SiteKind, on_value: Callable[[Site, Tensor], None], stop: int) -> None:
        """One dense pass over the first `stop` positions of every block."""
        ids = self.blocks.stack()[:, :stop]
        with (
            self.progress.task(what, ids.numel(), "tokens") as advance,
            tapped(self.loaded.sites, {kind: on_value}) as tap,
            torch.no_grad(),
        ):
            self._taps.append(tap)
            for block in ids:
                self.loaded.model.base_model(input_ids=block[None].to(self.loaded.device), use_cache=False)
                advance(len(block))

    def each_layer(self, what: str) -> Iterator[int]:
        """The layers in order, with progress shown while a fit works through them."""
        layers = self.loaded.record.layers
        with self.progress.task(what, layers, "layers") as advance:
            for layer in range(layers):
                yield layer
                advance(1)

    def down_norms(self, layer: int) -> Tensor:
        """||w_i|| of every column of an FFN's down projection [neurons], in float32."""
        return self.loaded.sites.ffns[layer].down_norms().cpu()

    def cett(self, layer: int, target: float) -> CettPoint:
        """The largest threshold on |a|*||w|| whose mean CETT is at most `target`, over the positions of `tokens`."""
        down = self._down(layer)
        return CettLayer.of(self.tokens[layer].flatten(0, 1).to(down.device), down).solve(target)

    def mask_error(self, layer: int, masks: Tensor) -> float:
        """Mean over continuation tokens of the relative error of the FFN output, on dense inputs."""
        down = self._down(layer)
        a = self.continuations[layer].to(down.device)
        mask = masks[:, None].expand_as(a).to(down.device)
        return float(relative_errors(a, mask, down, self._output_norms(layer, a, down)).double().mean())

    def _output_norms(self, layer: int, a: Tensor, down: Tensor) -> Tensor:
        if layer not in self._norms:
            self._norms.clear()
            self._norms[layer] = (a.float() @ down.T.float()).norm(dim=-1)
        return self._norms[layer]

    def _down(self, layer: int) -> Tensor:
        return self.loaded.sites.layers[layer].down_matrix(self.loaded.record.intermediate_size)

    @property
    def _sink(self) -> int:
        return self.blocks.record.sink_tokens

    @cached_property
    def _norms(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _taps(self) -> list[Tap]:
        return []

    @property
    def _tap(self) -> Tap:
        """What is known of the pass at work."""
        return self._taps[-1]

    @cached_property
    def _statistics(self) -> dict[tuple[PromptReading, int], list[Tensor]]:
        return {}


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


def widths_of(model: ModelRecord) -> tuple[int, ...]:
    """Neurons of each layer, or of each FFN in a model with experts."""
    return tuple(place.width for place in model.ffns)


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
        widths_of(loaded.record),
        statistics,
        lambda: Replay.of(loaded, blocks, prompt_length, progress),
        checkpoints,
        loaded.record.ffns,
    )
