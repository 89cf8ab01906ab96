"""Measurements of attention heads for the studies: how few a token needs (P2), and what KV policies cost with length
(P3; methods.md, section 8)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.head_cett import HeadCett
from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.base import Budget, Calibration
from actsparse.methods.gates import LayerGates
from actsparse.methods.heads_oracle import HeadsOracle
from actsparse.methods.heads_router import HeadsRouter
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.quality import scored_logits
from actsparse.results import KvPolicy, Site, SiteKind, Unit

SAMPLE_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSparsity:
    """P2 in one layer: the share of its heads (or KV groups) under the threshold whose mean CETT is `target`."""

    layer: int
    target: float
    sparsity: float
    eps: float
    cett: float
    tokens: int
    stderr: float | None


def head_sparsity(
    loaded: LoadedModel,
    blocks: Sequences,
    progress: Progress,
    *,
    target: float = 0.2,
    unit: Literal["head", "group"] = "head",
    tokens: int = SAMPLE_TOKENS,
) -> list[HeadSparsity]:
    """CETT sparsity of every layer with heads as units, over at most `tokens` evenly spaced positions of the blocks
    after the sink tokens, from one dense pass."""
    shape, sink = loaded.record, blocks.record.sink_tokens
    stride = max(1, -(-sum(len(ids) - sink for ids in blocks.ids) // tokens))
    found: dict[int, list[Tensor]] = {layer: [] for layer in range(shape.layers)}

    def see(site: Site, x: Tensor) -> None:
        found[site.layer].append(x[0, sink::stride].cpu())

    with (
        progress.task("reading heads", blocks.tokens, "tokens") as advance,
        tapped(loaded.sites, {SiteKind.ATTN_OUT: see}),
        torch.no_grad(),
    ):
        for ids in blocks.ids:
            loaded.model.base_model(input_ids=ids[None].to(loaded.device), use_cache=False)
            advance(len(ids))
    units = shape.heads if unit == "head" else shape.kv_heads
    return [_sparsity(loaded, layer, torch.cat(rows), units, target) for layer, rows in found.items()]


def _sparsity(loaded: LoadedModel, layer: int, o: Tensor, units: int, target: float) -> HeadSparsity:
    matrix = loaded.sites.layers[layer].output_matrix(o.shape[1]).cpu()
    point = HeadCett.of(o, matrix, units).solve(target)
    return HeadSparsity(
        layer=layer,
        target=target,
        sparsity=point.sparsity,
        eps=point.eps,
        cett=point.cett,
        tokens=point.tokens,
        stderr=point.sparsity_stderr,
    )


@dataclass(frozen=True)
class KvRun:
    """Head gates to be scored: a policy, and the share of KV groups dropped in the layers that are not dense."""

    policy: KvPolicy
    drop: float
    gates: Sequence[LayerGates]


@dataclass(frozen=True)
class KvCurve:
    """What one run cost: nll [blocks, positions] in nats of tokens P..S-1 (the first is predicted from the dense
    prompt), and the share of KV groups kept over all layers. `run` None is the dense model."""

    run: KvRun | None
    nll: Float[Tensor, "blocks positions"]
    kept_frac: float

    def perplexity(self, stop: int | None = None) -> float:
        """exp of the mean NLL over the first `stop` scored positions (None: all)."""
        return float(self.nll[:, :stop].double().mean().exp())


def head_runs(
    calibration: Calibration,
    policies: Sequence[KvPolicy],
    drops: Sequence[float],
    method: HeadsOracle | HeadsRouter | None = None,
) -> list[KvRun]:
    """Every policy at every share, by an oracle or a router that is fitted once a share.

    With `compute_all` alone this is the head masking sweep of P2; with all policies, P3.
    """
    method = method or HeadsOracle()
    runs = []
    for drop in drops:
        fit = method.fit(calibration, Budget(drop=drop))
        for policy in policies:
            chosen = replace(method, policy=policy.value)
            runs.append(KvRun(policy, drop, [chosen.gates(layer, fit) for layer in range(fit.depth)]))
    return runs


def kv_curves(
    loaded: LoadedModel, runs: Sequence[KvRun], blocks: Sequences, prompt_length: int, progress: Progress
) -> list[KvCurve]:
    """The dense model, then every run, scored on the same blocks in the decode regime, position by position."""
    scored: list[tuple[KvRun | None, Sequence[LayerGates]]] = [(None, [LayerGates()] * loaded.record.layers)]
    scored += [(run, run.gates) for run in runs]
    with progress.task("scoring KV policies", blocks.tokens * len(scored), "tokens") as advance:
        curves = []
        for run, gates in scored:
            rows, kept = [], []
            for block in blocks.ids:
                nll, share = _score(loaded, gates, block, prompt_length)
                rows.append(nll)
                kept.append(share)
                advance(len(block))
            curves.append(KvCurve(run, torch.stack(rows), sum(kept) / len(kept)))
    return curves


@torch.no_grad()
def _score(
    loaded: LoadedModel, gates: Sequence[LayerGates], block: Tensor, prompt_length: int
) -> tuple[Float[Tensor, " positions"], float]:
    plan = MaskedPlan(gates, prompt_length=prompt_length, sink_tokens=0)
    with masked(loaded.sites, plan):
        logits = scored_logits(loaded, block, prompt_length)
    targets = block[prompt_length:].to(logits.device)
    nll = -logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    kept = plan.kept_frac(Unit.KV_GROUP)
    return nll.cpu(), sum(kept) / len(kept)
