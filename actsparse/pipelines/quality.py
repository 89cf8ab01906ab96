"""Quality in the decode regime (methods.md, section 1): every plan against dense, block by block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, Tally, masked, probed
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.models.load import LoadedModel
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.progress import Advance, Progress
from actsparse.results import BlockLayerRow, TokenRow, Unit
from actsparse.store import tables
from actsparse.store.run import RunWriter

DENSE_PLACE = 0


@dataclass(frozen=True)
class Scores:
    """What the scored tokens of one block got, each [tokens]: nll and kl in nats, and equal argmax."""

    nll: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"]
    top1: Bool[Tensor, " tokens"]


@dataclass(frozen=True)
class Scoring:
    """One replica of one plan, with its place in the order of the evaluation."""

    name: str
    replica: int
    plan: Plan
    place: int


@dataclass(frozen=True)
class _Scorer:
    """Scores blocks; what is finished of a block, plan by plan, is kept in shards and not repeated."""

    loaded: LoadedModel
    runs: Sequence[Scoring]
    prompt_length: int
    sink_tokens: int
    writer: RunWriter
    advance: Advance

    def shards(self, index: int, place: int) -> tuple[Path, Path]:
        """Where the token rows and the layer rows of one plan over one block are kept."""
        name = f"{index:05d}-{place:04d}.parquet"
        return self.writer.shard(f"tokens-{name}"), self.writer.shard(f"layers-{name}")

    @torch.no_grad()
    def score(self, block: Tensor, index: int) -> None:
        """Every pass over one block that is missing: dense, which every other needs, then plan by plan."""
        missing = [run for run in self.runs if not self.shards(index, run.place)[0].exists()]
        dense_shard = self.shards(index, DENSE_PLACE)[0]
        self.advance(len(block) * (len(self.runs) - len(missing)))
        if not missing and dense_shard.exists():
            self.advance(len(block))
            return
        targets = block[self.prompt_length :].to(self.loaded.device)
        local = [self._masked(run.plan) for run in missing]
        with probed(self.loaded.sites, local):
            dense = scored_logits(self.loaded, block, self.prompt_length).log_softmax(dim=-1)
        rows = _frame(DENSE, 0, index, self.prompt_length, targets, _scores(dense, dense, targets))
        tables.write(dense_shard, rows)
        self.advance(len(block))
        for run, probe in zip(missing, local, strict=True):
            self._score_plan(run, block, index, dense, probe)
            self.advance(len(block))

    def _score_plan(self, run: Scoring, block: Tensor, index: int, dense: Tensor, probe: MaskedPlan) -> None:
        """One pass of one plan; its shards are written at once, the token rows last, which mark it as finished."""
        targets = block[self.prompt_length :].to(self.loaded.device)
        at_work = self._masked(run.plan)
        with masked(self.loaded.sites, at_work, errors=True):
            sparse = scored_logits(self.loaded, block, self.prompt_length).log_softmax(dim=-1)
        scores = _scores(dense, sparse, targets)
        tokens, layers = self.shards(index, run.place)
        sites = self.loaded.sites
        rows = _layer_rows(run.name, run.replica, index, at_work.by_layer(sites), probe.by_layer(sites))
        tables.write(layers, tables.frame(rows, BlockLayerRow))
        tables.write(tokens, _frame(run.name, run.replica, index, self.prompt_length, targets, scores))

    def _masked(self, plan: Plan) -> MaskedPlan:
        return MaskedPlan(plan.gates(), prompt_length=self.prompt_length, sink_tokens=self.sink_tokens)


def score_blocks(
    loaded: LoadedModel,
    groups: Sequence[PlanGroup],
    blocks: Sequences,
    prompt_length: int,
    writer: RunWriter,
    progress: Progress,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Token rows and layer rows of every block under dense and every plan; finished passes are not repeated."""
    replicas = [(group.name, replica, plan) for group in groups for replica, plan in enumerate(group.replicas)]
    runs = [Scoring(*one, place) for place, one in enumerate(replicas, DENSE_PLACE + 1)]
    ids = blocks.stack()
    with progress.task("scoring", ids.numel() * (1 + len(runs)), "tokens") as advance:
        scorer = _Scorer(loaded, runs, prompt_length, blocks.record.sink_tokens, writer, advance)
        for index, block in enumerate(ids):
            scorer.score(block, index)
    places = [DENSE_PLACE, *(run.place for run in runs)]
    shards = [scorer.shards(index, place) for index in range(len(ids)) for place in places]
    layers = [tables.read(layer, BlockLayerRow) for _, layer in shards if layer.exists()]
    return (
        pl.concat([tables.read(tokens, TokenRow) for tokens, _ in shards]),
        pl.concat(layers) if layers else tables.frame([], BlockLayerRow),
    )


def scored_logits(loaded: LoadedModel, block: Tensor, prompt_length: int) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of positions P-1..S-2 of one block, which predict tokens P..S-1."""
    inputs = block[None, :-1].to(loaded.device)
    output = loaded.model(input_ids=inputs, use_cache=False, logits_to_keep=len(block) - prompt_length)
    return output.logits[0].float()


def _scores(dense: Tensor, sparse: Tensor, targets: Tensor) -> Scores:
    """Scores of log-probabilities [tokens, vocab] against dense ones."""
    nll = -sparse.gather(1, targets[:, None]).squeeze(1)
    kl = (dense.exp() * (dense - sparse)).sum(dim=-1)
    return Scores(nll, kl, dense.argmax(dim=-1) == sparse.argmax(dim=-1))


def _frame(name: str, replica: int, index: int, prompt_length: int, targets: Tensor, scores: Scores) -> pl.DataFrame:
    count = len(targets)
    columns = {
        "plan": [name] * count,
        "replica": [replica] * count,
        "block": [index] * count,
        "position": list(range(prompt_length, prompt_length + count)),
        "token": targets.tolist(),
        "nll": scores.nll.double().tolist(),
        "kl": scores.kl.double().tolist(),
        "top1": scores.top1.tolist(),
    }
    return pl.DataFrame(columns, schema=tables.schema_of(TokenRow))


def _layer_rows(
    name: str, replica: int, index: int, run: Mapping[tuple[Unit, int], Tally], probe: Mapping[tuple[Unit, int], Tally]
) -> list[BlockLayerRow]:
    return [
        BlockLayerRow(
            plan=name,
            replica=replica,
            block=index,
            layer=layer,
            unit=unit.value,
            positions=found.positions,
            kept_frac=found.kept_frac,
            rel_err=probe.get((unit, layer), Tally()).mean_error,
            rel_err_path=found.mean_error,
        )
        for (unit, layer), found in sorted(run.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
