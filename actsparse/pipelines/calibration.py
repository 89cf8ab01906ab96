"""What methods are fitted from: statistics of calibration text, and its blocks replayed dense."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import polars as pl
import torch
from torch import Tensor

from actsparse.core.quantiles import quantile_of, share_below
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import relative_errors
from actsparse.errors import PlanError
from actsparse.methods.base import NeuronMeans
from actsparse.methods.prompt_statistic import PromptStatistic
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.profile import record_sequences
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.recording import ProfileState
from actsparse.results import ModelRecord, Site, SiteKind
from actsparse.store.runs import ProfileRun

REPLAY_BYTES = 512 * 2**20


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
        for layer in range(model.layers):
            rows = run.neurons.filter(pl.col("layer") == layer).sort("neuron")
            columns = [field.name for field in fields(NeuronMeans)]
            means.append(NeuronMeans(**{name: torch.from_numpy(rows[name].to_numpy().copy()) for name in columns}))
        histograms = {
            Site(layer=int(layer), kind=SiteKind(kind)): (
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
        for layer in state.layers:
            sums = state.neurons[layer]
            norms = loaded.sites.layers[layer].down_matrix(loaded.record.intermediate_size).float().norm(dim=0)
            tokens = max(1, sums.tokens)
            means.append(
                NeuronMeans(
                    mean_norm=sums.total_abs / tokens * norms.double().cpu(),
                    griffin=(sums.share_square / max(1, sums.rows)).sqrt(),
                    mean_square_up=sums.square_up / tokens,
                )
            )
        return cls(tuple(means), {site: moments.histogram.trimmed() for site, moments in state.moments.items()})


@dataclass(frozen=True)
class Replay:
    """Calibration blocks replayed dense: [layers] prompt statistics [blocks, neurons] and continuations.

    `continuations` [layers] of [blocks, positions, neurons] at positions P..S-1, every one or every n-th, so that all
    layers stay within 512 MB.
    """

    loaded: LoadedModel
    prompt_statistics: tuple[Tensor, ...]
    continuations: tuple[Tensor, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, blocks: Sequences, prompt_length: int, progress: Progress) -> "Replay":
        """One dense pass over the blocks."""
        ids = blocks.stack()
        shape = loaded.record
        sink = blocks.record.sink_tokens
        per_position = len(ids) * shape.intermediate_size * shape.layers * loaded.model.dtype.itemsize
        room = max(1, REPLAY_BYTES // per_position)
        stride = -(-(ids.shape[1] - prompt_length) // room)
        statistics: list[list[Tensor]] = [[] for _ in range(shape.layers)]
        continuations: list[list[Tensor]] = [[] for _ in range(shape.layers)]

        def on_value(site: Site, a: Tensor) -> None:
            statistic = PromptStatistic()
            statistic.add(a[0, sink:prompt_length])
            statistics[site.layer].append(statistic.value().cpu())
            continuations[site.layer].append(a[0, prompt_length::stride].cpu())

        with (
            progress.task("replaying calibration blocks", ids.numel(), "tokens") as advance,
            tapped(loaded.sites, {SiteKind.NEURON: on_value}),
            torch.no_grad(),
        ):
            for block in ids:
                loaded.model.base_model(input_ids=block[None].to(loaded.device), use_cache=False)
                advance(len(block))
        return cls(
            loaded,
            tuple(torch.stack(rows) for rows in statistics),
            tuple(torch.stack(rows) for rows in continuations),
        )

    def statistics(self, layer: int) -> Tensor:
        """The prompt statistic of every block."""
        return self.prompt_statistics[layer]

    def mask_error(self, layer: int, masks: Tensor) -> float:
        """Mean over continuation tokens of the relative error of the FFN output, on dense inputs."""
        down = self.loaded.sites.layers[layer].down_matrix(self.loaded.record.intermediate_size)
        a = self.continuations[layer].to(down.device)
        mask = masks[:, None].expand_as(a).to(down.device)
        return float(relative_errors(a, mask, down, self._output_norms(layer, a, down)).double().mean())

    def _output_norms(self, layer: int, a: Tensor, down: Tensor) -> Tensor:
        if layer not in self._norms:
            self._norms.clear()
            self._norms[layer] = (a.float() @ down.T.float()).norm(dim=-1)
        return self._norms[layer]

    @cached_property
    def _norms(self) -> dict[int, Tensor]:
        return {}


@dataclass(frozen=True)
class TextCalibration:
    """The calibration of methods: statistics and replays, each made when first asked for."""

    widths: tuple[int, ...]
    make_statistics: Callable[[], Statistics]
    make_replay: Callable[[], Replay]

    @cached_property
    def _statistics(self) -> Statistics:
        return self.make_statistics()

    @cached_property
    def _replay(self) -> Replay:
        return self.make_replay()

    def means(self, layer: int) -> NeuronMeans:
        return self._statistics.means[layer]

    def quantile(self, layer: int, kind: SiteKind, share: float) -> float:
        return quantile_of(*self._statistics.histograms[Site(layer=layer, kind=kind)], share)

    def share_below(self, layer: int, kind: SiteKind, threshold: float) -> float:
        return share_below(*self._statistics.histograms[Site(layer=layer, kind=kind)], threshold)

    def prompts(self) -> Replay:
        return self._replay


def widths_of(model: ModelRecord) -> tuple[int, ...]:
    """Neurons of each layer."""
    return (model.intermediate_size,) * model.layers


def of_blocks(loaded: LoadedModel, blocks: Sequences, prompt_length: int, progress: Progress) -> TextCalibration:
    """A calibration on blocks: recorded and replayed only as far as a method asks."""

    def statistics() -> Statistics:
        state = record_sequences(
            loaded,
            blocks,
            layers=tuple(range(loaded.record.layers)),
            kinds=(SiteKind.GATE, SiteKind.NEURON),
            slots=1,
            seed=0,
            batch_size=None,
            what="calibration statistics",
            progress=progress,
        )
        return Statistics.of_state(state, loaded)

    return TextCalibration(
        widths_of(loaded.record), statistics, lambda: Replay.of(loaded, blocks, prompt_length, progress)
    )
