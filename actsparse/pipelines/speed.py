"""Real sparse generation: timed against dense, checked against the masked path, and kept as samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import polars as pl
import torch
from torch import Tensor

from actsparse.engine import timing
from actsparse.engine.decode import forced, greedy, new_cache, prefill
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.engine.sparse import SparseDecoder, sparse_decoder, why_not_sliced
from actsparse.errors import DataError, ModelError
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.results import Generation, TimingRow
from actsparse.store.codec import decode, encode
from actsparse.store.files import write_bytes

NLL_TOLERANCE = 1e-3
SHORTEST_TIMED_PROMPT = 32
NGRAM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpeed:
    """What generation under one plan showed. `speed` is None where it was not timed, and `reason` says why.

    `useful_kept`: share of neurons of each layer that the engine read, mean over timed prompts. `path_check`: largest
    difference in NLL between engine and masked path on the checked tokens.
    """

    plan: str
    speed: timing.Speed | None = None
    reason: str | None = None
    path_check: float | None = None
    useful_kept: tuple[float, ...] = ()
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


def measure_all(session: Session, groups: Sequence[PlanGroup], tokens: pl.DataFrame) -> Speeds:
    """Dense first, then every plan; what was finished before is not repeated. `tokens`: the masked path's scores."""
    runner = _Runner(session, tokens)
    total = 1 + len(groups)
    with session.progress.task("generating and timing", total, "plans") as advance:
        dense = runner.kept("dense", runner.dense)
        advance(1)
        plans = {}
        for index, group in enumerate(groups):
            plans[group.name] = runner.kept(f"plan-{index:03d}", lambda g=group: runner.plan(g, dense))
            advance(1)
    for one in plans.values():
        if one.path_check is not None and one.path_check > NLL_TOLERANCE:
            session.warn(
                f"{one.plan}: engine and masked path differ by {one.path_check:.2g} nats on a token"
                f" (tolerance {NLL_TOLERANCE:g})"
            )
    return Speeds(dense, plans)


@dataclass(frozen=True)
class _Runner:
    session: Session
    tokens: pl.DataFrame

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
        samples = []
        for prompt, ids in self.sample_prompts():
            cache = new_cache(model, ids.shape[1] + spec.max_new_tokens)
            logits = prefill(model, ids, cache)
            text = greedy(model, logits, cache, ids.shape[1], spec.max_new_tokens, self.is_end)
            samples.append(self.sample(DENSE, prompt, ids, text[0].tolist(), None))
        return PlanSpeed(plan=DENSE, laps=tuple(laps), generations=tuple(samples))

    def plan(self, group: PlanGroup, dense: PlanSpeed) -> PlanSpeed:
        """One plan: with an engine timed, checked and sampled; without one sampled in the masked path."""
        if not group.named:
            return PlanSpeed(plan=group.name, reason="a control added for quality; name it with --plan to time it")
        if why_not_sliced(group.plan.gates()):
            samples = self.masked_samples(group, dense)
            reason = f"{group.plan.method.name} has no engine yet: its masked run is exact, and never faster"
            return PlanSpeed(plan=group.name, reason=reason, generations=samples)
        try:
            return self.engine(group, dense)
        except ModelError as error:
            return PlanSpeed(plan=group.name, reason=f"{error.what}; {error.hint}")

    def engine(self, group: PlanGroup, dense: PlanSpeed) -> PlanSpeed:
        """Sliced decode: path check, laps, samples."""
        spec, loaded = self.session.spec, self.session.loaded
        sink = self.session.texts.quality.record.sink_tokens
        laps: dict[int, list[timing.Lap]] = {}
        kept: list[Tensor] = []
        with sparse_decoder(loaded.sites, group.plan.gates(), sink_tokens=sink) as decoder:
            difference = self.path_check(group.name, decoder)
            if spec.timing_pairs:
                for prompt, ids in self.timed_prompts():
                    laps[prompt] = timing.measure(
                        loaded.model, decoder, ids, pairs=spec.timing_pairs, tokens=spec.timing_tokens
                    )
                    kept.append(torch.stack([mask.double().mean() for mask in decoder.masks]))
            samples = tuple(
                self.sample(group.name, prompt, ids, self.sparse_text(decoder, ids), dense)
                for prompt, ids in self.sample_prompts()
            )
        rows = tuple(_row(group.name, prompt, lap) for prompt, found in laps.items() for lap in found)
        return PlanSpeed(
            plan=group.name,
            speed=timing.summary(laps) if laps else None,
            reason=None if laps else "timing was left out (--timing-pairs 0)",
            path_check=difference,
            useful_kept=tuple(torch.stack(kept).mean(dim=0).tolist()) if kept else (),
            laps=rows,
            generations=samples,
        )

    def path_check(self, name: str, decoder: SparseDecoder) -> float | None:
        """The largest difference in NLL between sliced decode and the masked pass, over tokens of the first block."""
        count = self.session.spec.path_check_tokens
        if not count:
            return None
        model, start = self.session.loaded.model, self.session.texts.prompt_length
        block = self.session.texts.quality.ids[0].to(model.device)
        targets = block[start + 1 : start + 1 + count]
        cache = new_cache(model, start + count)
        decoder.prefill(block[None, :start], cache)
        decoder.select()
        logits = forced(model, block[None, start : start + len(targets)], cache, start)[0]
        found = -logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        rows = self.tokens.filter(plan=name, replica=0, block=0).sort("position")["nll"][1 : 1 + len(targets)]
        difference = float((found.double().cpu() - torch.from_numpy(rows.to_numpy().copy())).abs().max())
        decoder.dense()
        return difference if isfinite(difference) else None

    def sparse_text(self, decoder: SparseDecoder, ids: Tensor) -> list[int]:
        """The greedy continuation of one prompt by sliced decode."""
        model, room = self.session.loaded.model, self.session.spec.max_new_tokens
        cache = new_cache(model, ids.shape[1] + room)
        logits = decoder.prefill(ids, cache)
        decoder.select()
        text = greedy(model, logits, cache, ids.shape[1], room, self.is_end)
        decoder.dense()
        return text[0].tolist()

    def masked_samples(self, group: PlanGroup, dense: PlanSpeed) -> tuple[Generation, ...]:
        """Greedy continuations in the masked path."""
        return tuple(
            self.sample(group.name, prompt, ids, self.masked_text(group.plan, ids), dense)
            for prompt, ids in self.sample_prompts()
        )

    def masked_text(self, plan: Plan, ids: Tensor) -> list[int]:
        """The greedy continuation of one prompt in the masked path."""
        model, room = self.session.loaded.model, self.session.spec.max_new_tokens
        sink = self.session.texts.quality.record.sink_tokens
        run = MaskedPlan(plan.gates(), prompt_length=ids.shape[1], sink_tokens=sink)
        cache = new_cache(model, ids.shape[1] + room)
        with masked(self.session.loaded.sites, run):
            logits = prefill(model, ids, cache)
            return greedy(model, logits, cache, ids.shape[1], room, self.is_end)[0].tolist()

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

    def is_end(self, token: Tensor) -> bool:
        """Whether a generated token ends the text."""
        return int(token) == self.session.loaded.tokenizer.eos_token_id

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
