"""Quality in the decode regime (methods.md, section 1): every plan against dense, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.models.load import LoadedModel
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.progress import Advance, Progress
from actsparse.results import BlockLayerRow, TokenRow
from actsparse.store import tables
from actsparse.store.run import RunWriter


@dataclass(frozen=True)
class Scores:
    """What the scored tokens of one block got, each [tokens]: nll and kl in nats, and equal argmax."""

    nll: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"]
    top1: Bool[Tensor, " tokens"]


def score_blocks(
    loaded: LoadedModel,
    groups: Sequence[PlanGroup],
    blocks: Sequences,
    prompt_length: int,
    writer: RunWriter,
    progress: Progress,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Token rows and layer rows of every block under dense and every plan; finished blocks are not repeated."""
    passes = 1 + sum(len(group.replicas) for group in groups)
    ids = blocks.stack()
    with progress.task("scoring", ids.numel() * passes, "tokens") as advance:
        for index, block in enumerate(ids):
            token_shard, layer_shard = _shards(writer, index)
            if not (token_shard.exists() and layer_shard.exists()):
                token_rows, layer_rows = _score_block(
                    loaded, groups, block, index, prompt_length, blocks.record.sink_tokens, advance
                )
                tables.write(layer_shard, tables.frame(layer_rows, BlockLayerRow))
                tables.write(token_shard, token_rows)
            else:
                advance(len(block) * passes)
    shards = [_shards(writer, index) for index in range(len(ids))]
    return (
        pl.concat([tables.read(tokens, TokenRow) for tokens, _ in shards]),
        pl.concat([tables.read(layers, BlockLayerRow) for _, layers in shards]),
    )


def scored_logits(loaded: LoadedModel, block: Tensor, prompt_length: int) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of positions P-1..S-2 of one block, which predict tokens P..S-1."""
    inputs = block[None, :-1].to(loaded.device)
    output = loaded.model(input_ids=inputs, use_cache=False, logits_to_keep=len(block) - prompt_length)
    return output.logits[0].float()


def _score_block(
    loaded: LoadedModel,
    groups: Sequence[PlanGroup],
    block: Tensor,
    index: int,
    prompt_length: int,
    sink_tokens: int,
    advance: Advance,
) -> tuple[pl.DataFrame, list[BlockLayerRow]]:
    runs = [(group.name, replica, plan) for group in groups for replica, plan in enumerate(group.replicas)]
    targets = block[prompt_length:].to(loaded.device)
    with torch.no_grad():
        local = [_masked_plan(plan, prompt_length, sink_tokens) for _, _, plan in runs]
        with probed(loaded.sites, local):
            dense = scored_logits(loaded, block, prompt_length).log_softmax(dim=-1)
        advance(len(block))
        frames = [_frame(DENSE, 0, index, prompt_length, targets, _scores(dense, dense, targets))]
        layer_rows: list[BlockLayerRow] = []
        for (name, replica, plan), probe in zip(runs, local, strict=True):
            run = _masked_plan(plan, prompt_length, sink_tokens)
            with masked(loaded.sites, run, errors=True):
                logits = scored_logits(loaded, block, prompt_length)
            scores = _scores(dense, logits.log_softmax(dim=-1), targets)
            frames.append(_frame(name, replica, index, prompt_length, targets, scores))
            layer_rows += _layer_rows(name, replica, index, run, probe)
            advance(len(block))
    return pl.concat(frames), layer_rows


def _masked_plan(plan: Plan, prompt_length: int, sink_tokens: int) -> MaskedPlan:
    return MaskedPlan(plan.gates(), prompt_length=prompt_length, sink_tokens=sink_tokens)


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


def _layer_rows(name: str, replica: int, index: int, run: MaskedPlan, probe: MaskedPlan) -> list[BlockLayerRow]:
    return [
        BlockLayerRow(
            plan=name,
            replica=replica,
            block=index,
            layer=layer,
            unit=unit.value,
            positions=found.positions,
            kept_frac=found.kept_frac,
            rel_err=probe.tally(unit, layer).mean_error,
            rel_err_path=found.mean_error,
        )
        for (unit, layer), found in sorted(run.tallies.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _shards(writer: RunWriter, index: int) -> tuple[Path, Path]:
    return writer.shard(f"tokens-{index:05d}.parquet"), writer.shard(f"layers-{index:05d}.parquet")
