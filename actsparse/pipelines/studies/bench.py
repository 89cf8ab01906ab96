"""What experiments stand on: one model, its blocks, plans fitted once, and every scored block kept as a shard."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.core.cost import saved
from actsparse.core.overlap import topk_masks
from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.methods.plan import Plan, drops_of, fit_plan
from actsparse.methods.prompt_statistic import PromptReading
from actsparse.methods.short import DENSE, parse
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.studies.scores import FIELDS, Scored, mean_of
from actsparse.results import Site, SiteKind, StepBytes
from actsparse.store import tensors
from actsparse.store.run import RunWriter

DENSE_BYTES = 1 << 30

GatesOfBlock = Callable[[int], Sequence[LayerGates]]


@dataclass(frozen=True)
class Bench:
    """One model under study. `name` is how it is shown, `identity` the digest of its weights, configuration and
    tokenizer, which tells its shards from another's. `pool` [blocks, S] are all blocks of the text, of which the first
    `count` are scored; `calibration` is what plans are fitted on, `trainer` the larger text that routers learn from,
    `reader` reads the text again in other cuts, and `quick` says that sizes are small."""

    name: str
    identity: str
    loaded: LoadedModel
    pool: Int[Tensor, "blocks seq"]
    count: int
    prompt_length: int
    sink_tokens: int
    scored_sequences: Sequences
    calib_sequences: Sequences
    calibration: TextCalibration
    trainer: TextCalibration
    reader: TextReader
    cost: StepBytes
    writer: RunWriter
    progress: Progress
    quick: bool
    seed: int = 0
    counterpart: "Bench | None" = None
    _plans: dict[str, list[Plan]] = field(default_factory=dict)
    _dense: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.loaded.record.layers

    @property
    def block_length(self) -> int:
        return self.pool.shape[1]

    @property
    def scored(self) -> Int[Tensor, "blocks seq"]:
        """The blocks that are scored."""
        return self.scored_sequences.stack()

    @property
    def calib(self) -> Int[Tensor, "blocks seq"]:
        """The blocks that plans are fitted on."""
        return self.calib_sequences.stack()

    @property
    def whole(self) -> LayerGates:
        """Gates that keep every neuron."""
        return LayerGates(neurons=FixedGate(torch.ones(self.loaded.record.intermediate_size, dtype=torch.bool)))

    @property
    def reader_of_count(self) -> TextReader:
        """The reader with as many blocks as are scored."""
        return replace(self.reader, spec=replace(self.reader.spec, limit=self.count))

    @property
    def trained(self) -> "Bench":
        """The same bench with plans fitted on the larger text that routers learn from."""
        return replace(self, calibration=self.trainer)

    def first(self, count: int) -> "Bench":
        """The same bench with fewer blocks scored; what was fitted and scored is shared."""
        return replace(self, count=min(count, self.count))

    def joined(self, path: str) -> Sequences:
        """Prompts of a file joined into blocks of this bench's length."""
        spec = replace(self.reader.spec, corpus=None, dataset=None, prompts=(path,), limit=None, part="all",
                       block_length=self.block_length, prompt_length=self.prompt_length, prompt_frac=None)  # fmt: skip
        return replace(self.reader, spec=spec).calibration_blocks()

    @property
    def blocks(self) -> range:
        """The places in the pool of the blocks that are scored."""
        return range(self.count)

    def plans(self, short: str) -> list[Plan]:
        """The plans of a short form, one a seed, fitted once."""
        if short not in self._plans:
            gated = self.loaded.record.gated
            self._plans[short] = fit_plan(parse(short), self.calibration, self.cost, gated=gated)
        return self._plans[short]

    def plan(self, short: str) -> Plan:
        """The first plan of a short form."""
        return self.plans(short)[0]

    def score(self, short: str, *, prompt: int | None = None) -> Scored:
        """A short form (or `dense`) over every block in the decode regime, after a prompt of P or `prompt` tokens."""
        if short == DENSE:
            return self._score(DENSE, None, prompt)
        plans = self.plans(short)
        scored = [
            self._score(f"{short}#{place}", lambda _block, p=plan: p.gates(), prompt)
            for place, plan in enumerate(plans)
        ]
        return mean_of(scored)

    def score_gates(self, key: str, gates: GatesOfBlock, *, prompt: int | None = None) -> Scored:
        """Gates that are made for every block; `key` names them among the shards."""
        return self._score(key, gates, prompt)

    def _score(self, key: str, gates: GatesOfBlock | None, prompt: int | None) -> Scored:
        length = self.prompt_length if prompt is None else prompt
        parts = []
        with self.progress.task(f"{self.name}: {key}", self.count, "blocks") as advance:
            for block in self.blocks:
                shard = self.writer.shard(f"score-{_digest(self.identity, key, length, block, *FIELDS)}.safetensors")
                if not shard.exists():
                    tensors.write(shard, self._score_block(block, gates, length))
                parts.append(tensors.read(shard))
                advance(1)
        return Scored(*(torch.stack([part[name] for part in parts]) for name in FIELDS))

    @torch.no_grad()
    def _score_block(self, block: int, gates: GatesOfBlock | None, prompt: int) -> dict[str, Tensor]:
        targets = self.pool[block, prompt:].to(self.loaded.device)
        dense = self.dense_log_probs(block, prompt)
        if gates is None:
            sparse, kept, unread = dense, torch.ones(self.layers, dtype=torch.float64), 0.0
        else:
            run = MaskedPlan(gates(block), prompt_length=prompt, sink_tokens=self.sink_tokens)
            with masked(self.loaded.sites, run):
                sparse = self._log_probs(block, prompt)
            kept, unread = kept_by_layer(run, self.layers), self._unread(run)
        return {
            "nll": -sparse.gather(1, targets[:, None]).squeeze(1).double(),
            "kl": (dense.exp() * (dense - sparse)).sum(dim=-1).double(),
            "top1": (dense.argmax(dim=-1) == sparse.argmax(dim=-1)).double(),
            "kept": kept,
            "unread": torch.tensor(unread, dtype=torch.float64),
        }

    def _unread(self, run: MaskedPlan) -> float:
        """The share of the model's bytes that decode steps under a run's gates do not read, as counted."""
        dropped = {place: 1 - tally.kept_frac for place, tally in run.tallies.items()}
        drops = drops_of(run.gates, dropped, gated=self.loaded.record.gated)
        return saved(self.cost, drops).model_bytes_frac

    def dense_log_probs(self, block: int, prompt: int) -> Float[Tensor, "tokens vocab"]:
        """Dense log-probabilities that predict tokens P..S-1 of a block; kept in memory as far as 1 GB goes."""
        if (block, prompt) not in self._dense:
            found = self._log_probs(block, prompt)
            held = sum(one.numel() * 4 for one in self._dense.values())
            if held + found.numel() * 4 > DENSE_BYTES:
                self._dense.clear()
            self._dense[block, prompt] = found
        return self._dense[block, prompt]

    @torch.no_grad()
    def _log_probs(self, block: int, prompt: int) -> Float[Tensor, "tokens vocab"]:
        ids = self.pool[block][None, :-1].to(self.loaded.device)
        kept = self.block_length - prompt
        output = self.loaded.model(input_ids=ids, use_cache=False, logits_to_keep=kept)
        return output.logits[0].float().log_softmax(dim=-1)

    @torch.no_grad()
    def neurons(self, ids: Int[Tensor, " seq"], on_layer: Callable[[int, Float[Tensor, "seq neurons"]], None]) -> None:
        """One dense pass over a text; every layer's neuron activations go to `on_layer`."""

        def on_value(site: Site, a: Tensor) -> None:
            on_layer(site.layer, a[0])

        with tapped(self.loaded.sites, {SiteKind.NEURON: on_value}):
            self.loaded.model.base_model(input_ids=ids[None].to(self.loaded.device), use_cache=False)

    def statistics(self, ids: Int[Tensor, " seq"], tokens: slice) -> list[Float[Tensor, " neurons"]]:
        """GRIFFIN's statistic of every layer over some positions of a text."""
        found: dict[int, Tensor] = {}

        def on_layer(layer: int, a: Tensor) -> None:
            statistic = PromptReading().statistic(None)
            statistic.add(a[tokens])
            found[layer] = statistic.value()

        self.neurons(ids, on_layer)
        return [found[layer] for layer in range(self.layers)]

    @property
    def prompt_tokens(self) -> slice:
        """The prompt's positions after the sink tokens."""
        return slice(self.sink_tokens, self.prompt_length)


def kept_by_layer(run: MaskedPlan, layers: int) -> Float[Tensor, " layers"]:
    """The share kept in each layer, over all units that the plan decides about."""
    kept, units = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    for (_, layer), tally in run.tallies.items():
        kept[layer] += tally.kept
        units[layer] += tally.units
    return torch.where(units > 0, kept / units.clamp(min=1), 1.0)


def top_gates(scores: Sequence[Float[Tensor, " neurons"]], density: float) -> list[LayerGates]:
    """Gates that keep the top r*f of each layer's scores for every token."""
    return fixed_gates([topk_masks(one[None].cpu(), density)[0] for one in scores])


def fixed_gates(masks: Sequence[Bool[Tensor, " neurons"]]) -> list[LayerGates]:
    """Gates that keep one mask a layer for every token."""
    return [LayerGates(neurons=FixedGate(mask)) for mask in masks]


def _digest(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
