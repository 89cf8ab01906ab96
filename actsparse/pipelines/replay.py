"""Calibration blocks run dense again, for methods that ask more of a text than a profile's tables say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actsparse.core.cett import CettLayer, CettPoint
from actsparse.core.quantiles import LogHistogram
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import relative_errors
from actsparse.methods.gates import Statistic
from actsparse.methods.prompt_statistic import PromptReading
from actsparse.models.load import LoadedModel
from actsparse.models.taps import Tap, tapped
from actsparse.pipelines.progress import Progress
from actsparse.results import SHARED_EXPERT, Site, SiteKind

REPLAY_BYTES = 512 * 2**20
WHOLE_PROMPT = PromptReading()


@dataclass(frozen=True)
class Replay:
    """Calibration blocks of equal length run dense again, of which the first `prompt_length` positions are the prompt.
    Every question runs them once, when it is first asked."""

    loaded: LoadedModel
    blocks: Sequences
    prompt_length: int
    progress: Progress

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
        widths = self.loaded.record.ffn_widths
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
