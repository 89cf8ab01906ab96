"""Tier 1: a decode step of our own, on the CPU or on CUDA, behind the interface that every engine has."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from actsparse.engine.counting import Counting
from actsparse.engine.cpu.engine import CpuEngine
from actsparse.engine.decode import prefill
from actsparse.engine.gating import PlanState
from actsparse.engine.kept import BreakEven, KeptNeurons
from actsparse.engine.own_steps import OwnSteps
from actsparse.engine.refresh import Refresh
from actsparse.engine.step.copies import lists_alone
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, SlicedPlan
from actsparse.engine.step.sampling import STOP_EVERY, Sampling, cut, draw
from actsparse.engine.step.work import GatePlan
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.models.taps import tapped
from actsparse.results import Site, SiteKind, Unit


class OwnRun:
    """Decodes `batch` sequences of up to `max_length` tokens, dense and under one plan, from the same prompts.

    measured: the break-even of copies that another run of these gates found.
    """

    tier = 1

    def __init__(
        self,
        steps: OwnSteps,
        gates: Sequence[LayerGates],
        *,
        sink_tokens: int,
        batch: int,
        max_length: int,
        measured: BreakEven | None = None,
    ) -> None:
        self.gates = list(gates)
        self.batch = batch
        self.max_length = max_length
        self.warnings: list[str] = []
        self._steps = steps
        self._sink_tokens = sink_tokens
        self._engine = steps.engine(batch)
        self._plan = steps.translator.plan(gates, batch) if gates else None
        self._dense = DensePlan()
        self._decoder = Decoder(steps.weights, max_length=max_length, batch=batch, engine=self._engine)
        self._refresh = Refresh(self._plan, steps.weights, batch) if self._plan and self._refreshes else None
        self._counting = self._plan and Counting(self._engine.counters, self._plan, self._refresh)
        self._kept = self._plan and KeptNeurons(
            self._plan, steps.translator, self._decoder, chooses_again=self._refreshes, break_even=measured
        )
        self._prompt: PlanState | None = None
        self._state: PlanState | None = None
        self._start: tuple[Tensor, int] | None = None
        self._sparse = False
        self._moved = False  # whether the state has counted tokens since it was selected
        self._counted = 0
        self._logits = torch.zeros(0)
        self.followed = 0
        """Single steps since the masks were decided."""

    @property
    def path(self) -> str:
        """How the step at work runs."""
        return f"own step on {self._steps.weights.device.type}, {self._decoder.path}"

    @property
    def reading(self) -> str | None:
        """How what a plan keeps is read, and the break-even measured; None where there was nothing to choose."""
        return self._kept.told if self._kept else None

    @property
    def announced(self) -> list[str]:
        """Which better path could not be taken, and why."""
        return [*self.warnings, *(self._kept.warnings if self._kept else ()), *self._decoder.warnings]

    @property
    def watches(self) -> bool:
        """Whether masks depend on the prompt."""
        return bool(self._watched)

    @property
    def _watched(self) -> frozenset[SiteKind]:
        return frozenset(gates.neurons.site for gates in self.gates if isinstance(gates.neurons, PrefillGate))

    def prefill(
        self, ids: Int[Tensor, "batch seq"], *, watch: bool, padding: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Run prompts dense by the model's own forward, watching what gates need; the logits of their last position."""
        cache = DynamicCache(config=self._steps.sites.model.config)
        length = ids.shape[1]
        state = PlanState(self.gates, prompt_length=length, sink_tokens=self._sink_tokens)
        if not (watch and self.watches):
            logits = prefill(self._steps.sites.model, ids, cache, padding)
        else:
            left = () if padding is None else tuple(padding.tolist())

            def see(site: Site, x: Tensor) -> None:
                one = state.neurons[site.layer]
                if one is not None and isinstance(one.gate, PrefillGate) and one.gate.site is site.kind:
                    one.observe(x, 0, left)

            with tapped(self._steps.sites, dict.fromkeys(self._watched, see)):
                logits = prefill(self._steps.sites.model, ids, cache, padding)
        if watch:
            self._prompt = state
        self._logits = logits
        following = logits.argmax(dim=-1)
        self._decoder.load_prefill(cache, following, padding)
        self._start = (following, length)
        self._moved = False
        return logits

    def adopt(self, cache: Cache, prompt: PlanState, padding: Int[Tensor, " batch"] | None) -> None:
        """Take over prompts that ran elsewhere: their cache, and what the gates have seen of them."""
        self._prompt = prompt
        following = torch.zeros(self.batch, dtype=torch.long)
        self._decoder.load_prefill(cache, following, padding)
        self._start = (following, int(cache.get_seq_length()))
        self._moved = False

    def step(self, tokens: Int[Tensor, " batch"], position: int) -> Float[Tensor, "batch vocab"]:
        """Process one token a sequence at `position`; the logits of the next, valid until the next step."""
        self.followed += self._sparse
        self._start_at(tokens, position, self.followed)
        self._advance(1)
        return self._decoder.state.logits

    def written(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, 1, head_dim] of a layer at a position."""
        state, at = self._decoder.state, slice(position, position + 1)
        return state.keys[layer, :, :, at], state.values[layer, :, :, at]

    def select(self, tokens: int | None = None) -> None:
        """Decide the masks of the prompts prefilled last, and list what they keep; copy it where the `tokens` that
        follow repay that (None: once so many have followed)."""
        if self._prompt is not None:
            self._choose(deepcopy(self._prompt) if self._refreshes else self._prompt, tokens)

    def resume(self, followed: int) -> None:
        """The same by the gates' state that was adopted, which goes on from where it stands, `followed` tokens after
        the prompt: it counts each token, and what gates that choose again see stays in it."""
        if self._prompt is not None:
            self._choose(self._prompt, None)
            self.followed = followed

    def _choose(self, state: PlanState, tokens: int | None) -> None:
        if self._kept is None:
            return
        self._state = state
        self._moved = False
        self.followed = 0
        self._kept.choose(state.neurons)
        if tokens is not None:
            self._decoder.sample(None)
            self._kept.copy_if_repaid(tokens, self._restart)
        self.use(sparse=self._sparse)

    @property
    def measured(self) -> BreakEven | None:
        """What was measured of copies, for another run of these gates."""
        return self._kept.break_even if self._kept else None

    @property
    def break_even(self) -> float | None:
        """Decoded tokens after which copies of what is kept are repaid; None where there was nothing to choose."""
        return self._kept.repaid_after if self._kept else None

    def use(self, *, sparse: bool) -> None:
        """Decode under the plan, or dense, from now on."""
        self._sparse = sparse and self._kept is not None
        self._set(self._kept.work if self._sparse and self._kept else self._dense)

    def rewind(self) -> None:
        """Back to the end of the prompts."""
        self._restart()
        self._forget_tokens()

    def _start_at(self, tokens: Int[Tensor, " batch"], position: int, count: int) -> None:
        """Go on with `tokens` at `position`; under a plan from copies where `count` tokens repay them."""
        start = partial(self._decoder.start, tokens, position)
        if self._sparse and self._kept is not None and self._kept.copy_if_repaid(count, start):
            self._set(self._kept.work)
        start()

    def _restart(self) -> None:
        assert self._start is not None, "prefill comes first"
        self._decoder.start(*self._start)

    def feed(self, tokens: Int[Tensor, "batch count"]) -> None:
        """Process given tokens one by one, the first being the one after the prompt."""
        self.begin(tokens)
        self._advance(tokens.shape[1])

    def begin(self, tokens: Int[Tensor, "batch count"]) -> None:
        """Make ready to process given tokens, one at each `advance`."""
        assert self._start is not None, "prefill comes first"
        self._decoder.sample(None)
        self._decoder.start(tokens[:, 0], self._start[1])
        self._decoder.force(tokens[:, 1:])
        self._forget_tokens()

    def advance(self) -> None:
        """Process the next of the given tokens."""
        self._advance(1)

    def forced(self, tokens: Int[Tensor, "batch count"]) -> Float[Tensor, "batch count vocab"]:
        """Process given tokens one by one; the logits after each."""
        self.begin(tokens)
        found = []
        for _ in range(tokens.shape[1]):
            self._advance(1)
            found.append(self._decoder.state.logits.clone())
        return torch.stack(found, dim=1)

    def chosen(
        self, tokens: Int[Tensor, "batch count"]
    ) -> tuple[Float[Tensor, "batch count vocab"], dict[tuple[Unit, int], Bool[Tensor, "batch count units"]]] | None:
        """The same under the plan, with what its rules chose for each token by unit and layer; None where an engine
        does not tell."""
        if self._plan is None or self._refreshes or not isinstance(self._engine, CpuEngine):
            return None
        plan = replace(self._plan, records=True)
        self.begin(tokens)
        self._set(plan)
        logits, masks = [], {}
        for _ in range(tokens.shape[1]):
            self._decoder.decode(1)
            logits.append(self._decoder.state.logits.clone())
            for one in self._engine.choices[id(plan)]:
                masks.setdefault((Unit(one.unit), one.layer), []).append(one.kept)
        self.use(sparse=self._sparse)
        self._decoder.forget_plan(plan)
        return torch.stack(logits, dim=1), {place: torch.stack(found, dim=1) for place, found in masks.items()}

    def generate(
        self, count: int, *, sampling: Sampling | None = None, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Up to `count` tokens a sequence after the prompt, greedy or drawn; each ends with the first stop token.

        The first token is the one that the prompt's logits chose.
        """
        assert self._start is not None, "prefill comes first"
        self._decoder.force(None)
        self._decoder.sample(sampling)
        found = [self._first(sampling)[:, None]]
        self._start_at(found[0][:, 0], self._start[1], count)
        self._forget_tokens()
        made = 1
        while made < count and not _ended(found, stop):
            some = min(STOP_EVERY if stop else count, count - made)
            found.append(self._advance(some))
            made += some
        self._decoder.sample(None)
        return [cut(row, stop) for row in torch.cat(found, dim=1).tolist()]

    def kept(self) -> dict[tuple[str, int], float]:
        """The share of each unit of each layer that the plan's steps have read since `forget`; empty if not counted."""
        if self._kept is not None and self._reads_lists:
            return {(Unit.NEURON.value, layer): share for layer, share in enumerate(self._kept.shares())}
        if self._counting is None:
            return {}
        return self._counting.shares(self._counted)

    def forget(self) -> None:
        """Count what is read from here on."""
        self._counted = 0
        if self._refresh is not None:
            self._refresh.dense_steps.clear()
        if self._counting is not None:
            self._counting.forget()

    @property
    def _reads_lists(self) -> bool:
        """Whether a step reads what the lists of its plan name, or copies of it, and nothing else."""
        if self._plan is None or self._kept is None or self._refreshes or not lists_alone(self._plan):
            return False
        if isinstance(self._engine, CpuEngine):
            return True
        return self.batch <= self._steps.most_sequences and (self.batch == 1 or self._kept.work is not self._plan)

    @property
    def _refreshes(self) -> bool:
        return any(isinstance(g.neurons, PrefillGate) and g.neurons.refresh_every for g in self.gates)

    def _forget_tokens(self) -> None:
        """Let gates that choose again forget the tokens after the prompt."""
        if self._moved:
            self.select()

    def _first(self, sampling: Sampling | None) -> Int[Tensor, " batch"]:
        """The token that the prompts' logits choose."""
        assert self._start is not None
        if sampling is None:
            return self._start[0]
        state = self._decoder.state
        return draw(self._logits, state.uniform[:, self._start[1]], state.temperature, state.top_p)

    def _set(self, plan: GatePlan | SlicedPlan | DensePlan) -> None:
        self._decoder.set_plan(plan)

    def _advance(self, count: int) -> Tensor:
        """Decode `count` steps; the tokens [batch, count] that follow."""
        if self._sparse:
            self._counted += count
        if not (self._sparse and self._refreshes):
            return self._decoder.decode(count)
        return torch.cat([self._refreshing() for _ in range(count)], dim=1)

    def _refreshing(self) -> Tensor:
        """One step under gates that choose again: every so many tokens a dense one, whose activations they see."""
        assert self._state is not None, "select comes first"
        assert self._kept is not None
        assert self._refresh is not None
        self._moved = True
        dense = self._refresh.due(self._state)
        if dense:
            self._set(self._refresh.recorder(dense))
        following = self._decoder.decode(1)
        if dense:
            self._refresh.see(self._state, dense)
            self._kept.choose(self._state.neurons, again=True)
            self._set(self._kept.work)
        return following


def _ended(found: list[Tensor], stop: frozenset[int]) -> bool:
    """Whether every sequence has a stop token."""
    return bool(stop) and all(stop & set(row) for row in torch.cat(found, dim=1).tolist())
