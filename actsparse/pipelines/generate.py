"""`generate`: text of a loaded model under a plan by the fastest engine, which measures first whether the plan pays."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actsparse.engine import timing
from actsparse.engine.choose import Engines, Run
from actsparse.engine.decode import end_tokens
from actsparse.engine.forward import forward_run
from actsparse.engine.generation import sparse_generation
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.stepping import Decode
from actsparse.errors import PlanError
from actsparse.methods.gates import LayerGates
from actsparse.models.family_file import read_family
from actsparse.models.sites import ModelSites, resolve
from actsparse.pipelines.sparsify import gates_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What was generated: the new tokens of each sequence, its stop token among them.

    `decode`: whether the plan wrote them, or dense; `probe`: what was measured before (None where nothing can run the
    plan faster than dense); `engine`: how decode ran; `warnings`: which better path could not be taken, and why.
    """

    tokens: tuple[tuple[int, ...], ...]
    decode: Decode
    engine: str
    probe: timing.Probe | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    ids: Tensor
    padding: Tensor | None
    count: int
    sampling: Sampling | None
    stop: frozenset[int]
    when_slower: Decode
    sink_tokens: int

    @property
    def room(self) -> int:
        return self.ids.shape[1] + max(self.count, timing.PROBE_TOKENS) + 1


def generate(
    model: PreTrainedModel,
    plan: str | Path,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] | None = None,
    when_slower: Decode = "dense",
    sink_tokens: int = 4,
    family: str | Path | None = None,
) -> Generated:
    """Continuations of the prompts ids [batch, seq] int64, padded in front where attention_mask [batch, seq] is 0.

    Greedy at temperature 0; else drawn, from the fewest tokens that hold `top_p`: one seed gives the same text whatever
    the engine, up to rounding. Each sequence ends after `max_new_tokens`, or with a token of `stop` (None: those that
    end the model's own texts). `plan` as in `sparsify`. The prompts run dense; a short probe then times the plan
    against dense. Where the plan loses every pair of it, or no engine runs the plan, `when_slower` says how to go on:
    "dense", so that a clock decides which model writes the text (`Generated.decode` says which did), or "sparse" all
    the same: use that where the text must be the plan's. A plan that is neither clearly slower nor faster stays at
    work, with a warning.

    Raises PlanError where the plan does not fit the model or needs text, and for batches that no engine runs.
    """
    sites = resolve(model, None if family is None else read_family(Path(family)).row)
    request = _Request(
        ids=ids.to(model.device),
        padding=None if attention_mask is None else attention_mask.long().argmax(dim=1).to(model.device),
        count=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed) if temperature else None,
        stop=end_tokens(model) if stop is None else stop,
        when_slower=when_slower,
        sink_tokens=sink_tokens,
    )
    gates, engines = gates_for(sites, plan), Engines(sites, share=False)
    try:
        return _by_engine(engines, gates, request)
    except PlanError as refused:
        if len(ids) > 1:
            raise
        return _without_engine(engines, sites, gates, request, refused.what)


def _by_engine(engines: Engines, gates: list[LayerGates], request: _Request) -> Generated:
    ids = request.ids
    with engines.open(gates, sink_tokens=request.sink_tokens, max_length=request.room, batch=len(ids)) as run:
        run.prefill(ids, watch=True, padding=request.padding)
        run.select(request.count)
        probe = timing.probe(run, engines.sites.model)
        warnings = []
        decode: Decode = request.when_slower if probe.slower else "sparse"
        if not probe.pays:
            found = "does not pay here" if probe.slower else "is not clearly faster or slower than dense here"
            warnings.append(f"this plan {found}: {probe.text}; decode goes on {decode}")
        return _generated(run, request, decode, probe, warnings)


def _without_engine(
    engines: Engines, sites: ModelSites, gates: list[LayerGates], request: _Request, reason: str
) -> Generated:
    """One sequence under a plan that no engine runs: dense, or masked, which is slower."""
    sink, room = request.sink_tokens, request.room
    if request.when_slower == "dense":
        with engines.open((), sink_tokens=sink, max_length=room) as run:
            run.prefill(request.ids, watch=False, padding=request.padding)
            return _generated(run, request, "dense", None, [f"{reason}; decode goes on dense"])
    with (
        sparse_generation(sites, gates, sink_tokens=sink),
        forward_run(sites, (), sink_tokens=sink, max_length=room, tier=3) as run,
        torch.no_grad(),
    ):
        run.prefill(request.ids, watch=False, padding=request.padding)
        return _generated(run, request, "sparse", None, [f"{reason}; decode is masked, and slower than dense"])


def _generated(
    run: Run, request: _Request, decode: Decode, probe: timing.Probe | None, warnings: list[str]
) -> Generated:
    run.use(sparse=decode == "sparse")
    run.rewind()
    found = run.generate(request.count, sampling=request.sampling, stop=request.stop)
    return Generated(
        tokens=tuple(tuple(one) for one in found),
        decode=decode,
        engine=run.path,
        probe=probe,
        warnings=tuple(dict.fromkeys([*run.announced, *warnings])),
    )
