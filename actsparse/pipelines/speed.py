"""Real sparse generation: timed against dense, checked against the masked path, and kept as samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isnan
from typing import Any

from torch import Tensor

from actsparse.engine import timing
from actsparse.engine.choose import Engines, Run
from actsparse.engine.decode import end_tokens
from actsparse.engine.forward import forward_run
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.engine.path_check import PathCheck, path_check
from actsparse.engine.step.sampling import Sampling
from actsparse.errors import DataError, ModelError, PlanError, is_out_of_memory
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.pipelines.unread import UNITS
from actsparse.results import Generation, TimingRow, Unit, Verdict, path_tolerance
from actsparse.store.codec import decode, encode
from actsparse.store.files import write_bytes

FLIPS_TOLERANCE = 1e-2
SHORTEST_TIMED_PROMPT = 32
NGRAM = 4
NO_MEMORY = "out of memory: its decode does not fit beside the model; give shorter prompts or fewer tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptShare:
    """The share of a unit of a layer that the engine read."""

    unit: Unit
    layer: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpeed:
    """What generation under one plan showed. `speed` is None where it was not timed, and `reason` says why.

    `engine`: how decode ran, `tier` how good that is (1 best), `warnings` which better path could not be taken,
    `reading`: whether kept neurons were copied, and from how many tokens on that pays (of timed laps alone: a clock
    says it).
    `useful_kept`: what the engine read, over all timed laps. `path_check`: largest difference in NLL between engine and
    masked path on the checked tokens, both with the engine's choices; `path_lost`: checked tokens where the masked path
    is finite and the engine is not; `path_flips`: share that the masked path would choose otherwise.
    `read_bandwidth` (dense only): bytes a second of a read-only reduction.
    """

    plan: str
    speed: timing.Speed | None = None
    reason: str | None = None
    path_check: float | None = None
    path_lost: int | None = None
    path_flips: float | None = None
    engine: str | None = None
    reading: str | None = None
    tier: int | None = None
    warnings: tuple[str, ...] = ()
    read_bandwidth: float | None = None
    useful_kept: tuple[KeptShare, ...] = ()
    laps: tuple[TimingRow, ...] = ()
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True)
class Speeds:
    """What generation showed, dense and under every plan."""

    dense: PlanSpeed
    plans: dict[str, PlanSpeed]

    @property
    def all(self) -> list[PlanSpeed]:
        return [self.dense, *self.plans.values()]


def measure_all(session: Session, groups: Sequence[PlanGroup]) -> Speeds:
    """Dense first, then every plan; what was finished before is not repeated."""
    engines = Engines(session.loaded.sites, session.progress.note, fast_atomics=session.spec.fast_atomics)
    runner = _Runner(session, engines)
    total = 1 + len(groups)
    with session.progress.task("generating and timing", total, "plans") as advance:
        dense = runner.kept("dense", runner.dense)
        advance(1)
        plans = {}
        for index, group in enumerate(groups):
            try:
                plans[group.name] = runner.kept(f"plan-{index:03d}", lambda g=group: runner.plan(g, dense))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # not kept: a run that is resumed tries again
                plans[group.name] = PlanSpeed(plan=group.name, reason=NO_MEMORY)
                session.warn(f"{group.name} was not timed: {NO_MEMORY}")
            advance(1)
    tolerance = path_tolerance(str(session.loaded.model.dtype))
    for one in plans.values():
        if one.path_check is not None and one.path_check > tolerance:
            session.warn(
                f"{one.plan}: engine and masked path differ by {one.path_check:.2g} nats on a token"
                f" (tolerance {tolerance:g})"
            )
        if one.path_lost:
            session.warn(
                f"{one.plan}: the engine gives no finite likelihood on {one.path_lost} of the checked tokens"
                " where the masked path does; its text and speed are not to be trusted"
            )
        if one.path_flips is not None and one.path_flips > FLIPS_TOLERANCE:
            session.warn(f"{one.plan}: engine and masked path choose otherwise at {one.path_flips:.2%} of the entries")
        if one.speed is not None and one.speed.verdict is Verdict.SLOWER:
            session.warn(f"{one.plan} does not pay here: {one.speed.speedup:.2f}x of dense decode; run dense instead")
    for text in dict.fromkeys(text for one in (dense, *plans.values()) for text in one.warnings):
        session.warn(text)
    return Speeds(dense, plans)


@dataclass(frozen=True)
class _Runner:
    session: Session
    engines: Engines

    def kept(self, name: str, make: Callable[[], PlanSpeed]) -> PlanSpeed:
        """The result kept in a shard, or made now and kept there."""
        shard = self.session.writer.shard(f"speed-{name}.json")
        if shard.exists():
            return decode(shard.read_bytes(), PlanSpeed, str(shard))
        made = make()
        write_bytes(shard, encode(made))
        return made

    def dense(self) -> PlanSpeed:
        """The model's own generate timed, and the dense samples."""
        spec, model = self.session.spec, self.session.loaded.model
        laps: list[TimingRow] = []
        if spec.timing_pairs:
            for prompt, ids in self.timed_prompts():
                found = timing.measure_generate(model, ids, tokens=spec.timing_tokens)
                laps += [_row(DENSE, prompt, lap) for lap in found]
        with self.opened(()) as run:
            samples = []
            for prompt, ids in self.sample_prompts():
                run.prefill(ids, watch=False)
                run.use(sparse=False)
                sampling = self.sampling(prompt)
                text = run.generate(spec.max_new_tokens, sampling=sampling, stop=self.stops)[0]
                samples.append(self.sample(DENSE, prompt, ids, text, None))
            return PlanSpeed(
                plan=DENSE,
                engine=run.path,
                tier=run.tier,
                warnings=tuple(run.announced),
                read_bandwidth=timing.read_bandwidth(model.device) if spec.timing_pairs else None,
                laps=tuple(laps),
                generations=tuple(samples),
            )

    def plan(self, group: PlanGroup, dense: PlanSpeed) -> PlanSpeed:
        """One plan: with an engine timed, checked and sampled; without one sampled in the masked path."""
        if not group.named:
            return PlanSpeed(plan=group.name, reason="a control added for quality; name it with --plan to time it")
        try:
            return self.engine(group, dense)
        except PlanError as error:
            samples = self.masked_samples(group, dense)
            return PlanSpeed(plan=group.name, reason=f"{error.what}; {error.hint}", generations=samples)
        except ModelError as error:
            return PlanSpeed(plan=group.name, reason=f"{error.what}; {error.hint}")

    def opened(self, gates: Sequence[LayerGates]) -> AbstractContextManager[Run]:
        """The best engine for these gates, with room for every prompt and what follows it."""
        spec = self.session.spec
        longest = max((ids.shape[1] for ids in self._prompts()), default=0)
        after = max(spec.max_new_tokens, spec.timing_tokens + 1)
        room = max(longest + after, self.session.texts.prompt_length + spec.path_check_tokens) + 1
        sink = self.session.texts.quality.record.sink_tokens
        return self.engines.open(gates, sink_tokens=sink, max_length=room)

    def engine(self, group: PlanGroup, dense: PlanSpeed) -> PlanSpeed:
        """Sparse decode: path check, laps, samples."""
        spec, loaded = self.session.spec, self.session.loaded
        laps: dict[int, list[timing.Lap]] = {}
        shares: list[dict[tuple[str, int], float]] = []
        with self.opened(group.plan.gates()) as run:
            check = self.path_check(group, run)
            if spec.timing_pairs:
                for prompt, ids in self.timed_prompts():
                    laps[prompt] = timing.measure(
                        run, loaded.model, ids, pairs=spec.timing_pairs, tokens=spec.timing_tokens
                    )
                    shares.append(run.kept())
            reading = run.reading if laps else None
            samples = tuple(
                self.sample(group.name, prompt, ids, self.sparse_text(run, prompt, ids), dense)
                for prompt, ids in self.sample_prompts()
            )
            path, tier, announced = run.path, run.tier, tuple(run.announced)
        rows = tuple(_row(group.name, prompt, lap) for prompt, found in laps.items() for lap in found)
        return PlanSpeed(
            plan=group.name,
            speed=timing.summary(laps) if laps else None,
            reason=None if laps else "timing was left out (--timing-pairs 0)",
            path_check=None if check is None or isnan(check.difference) else check.difference,
            path_lost=None if check is None else check.lost,
            path_flips=None if check is None else check.flips,
            engine=path,
            reading=reading,
            tier=tier,
            warnings=announced,
            useful_kept=_mean_shares(shares),
            laps=rows,
            generations=samples,
        )

    def path_check(self, group: PlanGroup, run: Run) -> PathCheck | None:
        """Engine against masked path on tokens of the first block; None where that was left out."""
        spec, texts = self.session.spec, self.session.texts
        count = spec.path_check_tokens
        if not count:
            return None
        block = texts.quality.ids[0][: texts.prompt_length + 1 + count].to(self.session.loaded.model.device)
        return path_check(
            run, self.session.loaded.sites, group.plan.gates(), block, texts.prompt_length,
            sink_tokens=texts.quality.record.sink_tokens, followed_by=spec.timing_tokens if spec.timing_pairs else None,
        )  # fmt: skip

    def sparse_text(self, run: Run, prompt: int, ids: Tensor) -> list[int]:
        """The continuation of one prompt by sparse decode."""
        run.prefill(ids, watch=True)
        run.select()
        run.use(sparse=True)
        count, sampling = self.session.spec.max_new_tokens, self.sampling(prompt)
        text = run.generate(count, sampling=sampling, stop=self.stops)[0]
        run.use(sparse=False)
        return text

    def masked_samples(self, group: PlanGroup, dense: PlanSpeed) -> tuple[Generation, ...]:
        """Continuations in the masked path."""
        return tuple(
            self.sample(group.name, prompt, ids, self.masked_text(group.plan, prompt, ids), dense)
            for prompt, ids in self.sample_prompts()
        )

    def masked_text(self, plan: Plan, prompt: int, ids: Tensor) -> list[int]:
        """The continuation of one prompt in the masked path."""
        sites, count = self.session.loaded.sites, self.session.spec.max_new_tokens
        sink = self.session.texts.quality.record.sink_tokens
        rule = MaskedPlan(plan.gates(), prompt_length=ids.shape[1], sink_tokens=sink)
        room = ids.shape[1] + count + 1
        with masked(sites, rule), forward_run(sites, (), sink_tokens=sink, max_length=room, tier=3) as run:
            run.prefill(ids, watch=False)
            return run.generate(count, sampling=self.sampling(prompt), stop=self.stops)[0]

    def timed_prompts(self) -> list[tuple[int, Tensor]]:
        """The first prompts that are long enough to time, with their places."""
        long = [(i, ids) for i, ids in enumerate(self._prompts()) if ids.shape[1] >= SHORTEST_TIMED_PROMPT]
        return (long or list(enumerate(self._prompts())))[: self.session.spec.timing_prompts]

    def sample_prompts(self) -> list[tuple[int, Tensor]]:
        """The prompts that are continued as samples, with their places."""
        return list(enumerate(self._prompts()))[: self.session.spec.generations]

    def _prompts(self) -> list[Tensor]:
        limit = self.session.loaded.record.max_positions
        room = max(self.session.spec.max_new_tokens, self.session.spec.timing_tokens + 1)
        if limit is not None and room >= limit:
            raise DataError(
                f"{room} new tokens leave no room for a prompt in the model's context of {limit}",
                "use a smaller --max-new-tokens or --timing-tokens",
            )
        cut = None if limit is None else limit - room
        device = self.session.loaded.device
        return [ids[-cut:][None].to(device) if cut else ids[None].to(device) for ids in self.session.texts.prompts.ids]

    @property
    def stops(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's, and those of the model's generation config."""
        end: Any = self.session.loaded.tokenizer.eos_token_id
        return end_tokens(self.session.loaded.model) | (frozenset() if end is None else {int(end)})

    def sampling(self, prompt: int) -> Sampling | None:
        """How the tokens of a sample are drawn, by the same numbers under every plan; None for greedy ones."""
        spec = self.session.spec
        if not spec.temperature:
            return None
        return Sampling(temperature=spec.temperature, top_p=spec.top_p, seed=spec.data.seed + prompt)

    def sample(self, name: str, prompt: int, ids: Tensor, tokens: list[int], dense: PlanSpeed | None) -> Generation:
        """One continuation as a record, with where it leaves the dense one."""
        tokenizer = self.session.loaded.tokenizer
        reference = None if dense is None else next(g for g in dense.generations if g.prompt == prompt)
        return Generation(
            plan=name,
            prompt=prompt,
            prompt_text=str(tokenizer.decode(ids[0], skip_special_tokens=True)),
            text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
            tokens=len(tokens),
            token_ids=tuple(tokens),
            first_divergence=None if reference is None else first_divergence(reference.token_ids, tokens),
            repetition=repetition(tokens),
        )


def first_divergence(dense: Sequence[int], sparse: Sequence[int]) -> int | None:
    """The first generated position at which two continuations differ; None when they are the same."""
    for index, (one, other) in enumerate(zip(dense, sparse, strict=False)):
        if one != other:
            return index
    return None if len(dense) == len(sparse) else min(len(dense), len(sparse))


def repetition(tokens: Sequence[int]) -> float:
    """The share of 4-grams of a text that occurred in it before; 0 for texts without 4-grams."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean_shares(found: Sequence[dict[tuple[str, int], float]]) -> tuple[KeptShare, ...]:
    """What was read of each unit of each layer, mean over prompts; units that only an engine knows are left out."""
    places = [place for place in (found[0] if found else ()) if place[0] in UNITS]
    return tuple(
        KeptShare(unit=Unit(unit), layer=layer, share=sum(one[unit, layer] for one in found) / len(found))
        for unit, layer in places
    )


def _row(plan: str, prompt: int, lap: timing.Lap) -> TimingRow:
    return TimingRow(
        plan=plan,
        arm=lap.arm,
        phase=lap.phase,
        prompt=prompt,
        repetition=lap.repetition,
        tokens=lap.tokens,
        seconds=lap.seconds,
    )
