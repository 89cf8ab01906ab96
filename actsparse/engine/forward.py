"""Tiers 2 and 3: the model's own forward decodes, with modules that read kept neurons only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from actsparse.engine.decode import new_cache, prefill, step, takes_static_cache
from actsparse.engine.forward_graph import GraphedSteps, refill, why_not_captured
from actsparse.engine.sparse import SparseDecoder, sparse_decoder
from actsparse.engine.step.sampling import STOP_EVERY, Sampling, cut, draw
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites


class ForwardRun:
    """Decodes one sequence by the model's forward, dense and (with a `decoder`) sliced, from the same prompt."""

    batch = 1

    def __init__(self, sites: ModelSites, decoder: SparseDecoder | None, *, max_length: int, tier: int) -> None:
        self.tier = tier
        self.max_length = max_length
        self.warnings: list[str] = []
        self._sites = sites
        self._decoder = decoder
        self._kept_cache: Cache | None = None
        self._cache: Cache | None = None
        self._logits = torch.zeros(0)
        self._start = 0
        self._sparse = False
        self._given = torch.zeros(1, 0, dtype=torch.long)
        self._fed = 0
        self._graphs: GraphedSteps | None = None

    @property
    def path(self) -> str:
        """How the step at work runs."""
        kind = "a static cache" if takes_static_cache(self._sites.model) else "a growing cache"
        captured = self._graphs is not None and self._graphs.kind(self._key) == "graph"
        return f"the model's own forward, {kind}{', in a CUDA graph' if captured else ''}"

    @property
    def announced(self) -> list[str]:
        """Which better path could not be taken, and why."""
        return [*self.warnings, *(self._graphs.warnings if self._graphs is not None else [])]

    @property
    def _key(self) -> tuple[int, ...]:
        """The kind of step, and which buffers it reads."""
        return (1, self._decoder.version) if self._sparse and self._decoder is not None else (0,)

    @property
    def watches(self) -> bool:
        """Whether masks depend on the prompt."""
        return self._decoder is not None and self._decoder.watches

    def prefill(
        self, ids: Int[Tensor, "1 seq"], *, watch: bool, padding: Int[Tensor, " 1"] | None = None
    ) -> Float[Tensor, "1 vocab"]:
        """Run a prompt dense, watching what gates need; the logits of its last position."""
        cache = new_cache(self._sites.model, self.max_length)
        if self._decoder is not None and watch:
            self._logits = self._decoder.prefill(ids, cache)
        else:
            if self._decoder is not None:
                self._decoder.dense()
            self._logits = prefill(self._sites.model, ids, cache, padding)
        self._kept_cache, self._start = cache, ids.shape[1]
        self._cache = None
        return self._logits

    def select(self, tokens: int | None = None) -> None:
        """Decide the masks of the prompt prefilled last, and gather what they keep."""
        if self._decoder is not None:
            self._decoder.select()
            self.use(sparse=self._sparse)

    @property
    def reading(self) -> None:
        """Nothing was to choose: these steps read copies."""
        return None

    @property
    def break_even(self) -> None:
        """Nothing was to choose: these steps read copies."""
        return None

    def use(self, *, sparse: bool) -> None:
        """Decode under the plan, or dense, from now on."""
        self._sparse = sparse
        if self._decoder is not None:
            if sparse:
                self._decoder.sparse()
            else:
                self._decoder.dense()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        assert self._kept_cache is not None, "prefill comes first"
        if self._graphs is None:
            self._graphs = self._new_graphs(self._kept_cache)
        if self._graphs is None:
            self._cache = deepcopy(self._kept_cache)
            return
        self._cache = self._graphs.cache
        if self._start + 2 < self.max_length:  # trying a step out takes two positions
            self._graphs.ready(self._key, self._start)
        refill(self._cache, self._kept_cache)

    def _new_graphs(self, cache: Cache) -> GraphedSteps | None:
        model = self._sites.model
        if next(model.parameters()).device.type != "cuda":
            return None
        reason = why_not_captured(model, cache)
        if reason is None:
            return GraphedSteps(model, deepcopy(cache))
        warning = f"steps are not captured in a CUDA graph: {reason}"
        if warning not in self.warnings:
            self.warnings.append(warning)
        return None

    def _step(self, token: Int[Tensor, "1 1"], at: int) -> Float[Tensor, "1 vocab"]:
        """Feed one token at a position; the logits of the next, valid until the next step."""
        assert self._cache is not None, "begin comes first"
        position = torch.full_like(token, at)
        if self._graphs is not None:
            return self._graphs(self._key, token, position)
        return step(self._sites.model, token, position, self._cache)

    def feed(self, tokens: Int[Tensor, "1 count"]) -> None:
        """Process given tokens one by one, the first being the one after the prompt."""
        self.forced(tokens)

    def begin(self, tokens: Int[Tensor, "1 count"]) -> None:
        """Make ready to process given tokens, one at each `advance`."""
        if self._cache is None:
            self.rewind()
        self._given, self._fed = tokens, 0

    def advance(self) -> None:
        """Process the next of the given tokens."""
        self._step(self._given[:, self._fed : self._fed + 1], self._start + self._fed)
        self._fed += 1

    def forced(self, tokens: Int[Tensor, "1 count"]) -> Float[Tensor, "1 count vocab"]:
        """Process given tokens one by one; the logits after each."""
        self.begin(tokens)
        found = [self._step(tokens[:, i : i + 1], self._start + i).clone() for i in range(tokens.shape[1])]
        self._cache = None
        return torch.stack(found, dim=1)

    def chosen(self, tokens: Int[Tensor, "1 count"]) -> None:
        """Masks hold for the whole sequence here; no rule chooses token by token."""

    @torch.no_grad()
    def generate(
        self, count: int, *, sampling: Sampling | None = None, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Up to `count` tokens after the prompt, greedy or drawn; they end with the first stop token."""
        self.rewind()
        logits = self._logits
        uniform = None if sampling is None else sampling.uniform(1, self.max_length).to(logits.device)
        made: list[Tensor] = []
        while True:
            at = self._start + len(made)
            if sampling is None or uniform is None:
                made.append(logits.argmax(dim=-1))
            else:
                made.append(_drawn(logits, uniform[:, at], sampling))
            # A look at the tokens waits for the device.
            looks = len(made) == count or (stop and len(made) % STOP_EVERY == 0)
            if looks and (len(made) == count or stop & set(torch.cat(made).tolist())):
                break
            logits = self._step(made[-1][:, None], at)
        self._cache = None
        return [cut(torch.cat(made).tolist(), stop)]

    def kept(self) -> dict[tuple[str, int], float]:
        """The share of neurons of each layer that the masks selected last keep."""
        if self._decoder is None:
            return {}
        return {("neuron", i): float(mask.double().mean()) for i, mask in enumerate(self._decoder.masks)}

    def forget(self) -> None:
        """Masks say what is read; nothing is counted."""


def _drawn(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    temperature = torch.tensor([sampling.temperature], device=logits.device)
    return draw(logits, uniform, temperature, torch.tensor([sampling.top_p], device=logits.device))


@contextmanager
def forward_run(
    sites: ModelSites, gates: Sequence[LayerGates], *, sink_tokens: int, max_length: int, tier: int
) -> Iterator[ForwardRun]:
    """A run of the model's forward; the model is as before when the block ends.

    Raises PlanError where gates are of a kind that needs a step of our own.
    """
    if not gates:
        yield ForwardRun(sites, None, max_length=max_length, tier=tier)
        return
    with sparse_decoder(sites, gates, sink_tokens=sink_tokens) as decoder:
        yield ForwardRun(sites, decoder, max_length=max_length, tier=tier)
