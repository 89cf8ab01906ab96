"""Local tasks in the decode regime: every item under dense and under every plan."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import polars as pl
import torch
from transformers import PreTrainedTokenizerBase

from actsparse.data.tasks import BETWEEN, Choice, Question, Task, final_number
from actsparse.engine.decode import greedy, new_cache, prefill
from actsparse.engine.generation import sparse_generation
from actsparse.errors import DataError
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.models.load import LoadedModel
from actsparse.pipelines.continuations import Continuations
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.results import TaskItemRow
from actsparse.store import tables

SHARD_ITEMS = 16
STOPS = (BETWEEN, "\nQuestion:", "Question:")


@dataclass(frozen=True)
class Arm:
    """One plan of a task run (`plan` None: dense), with its place in the order of the evaluation."""

    name: str
    replica: int
    plan: Plan | None
    place: int


def arms_of(groups: Sequence[PlanGroup]) -> list[Arm]:
    """Dense, then every replica of every plan."""
    plans = [(DENSE, 0, None), *((g.name, r, plan) for g in groups for r, plan in enumerate(g.replicas))]
    return [Arm(name, replica, plan, place) for place, (name, replica, plan) in enumerate(plans)]


def score_tasks(session: Session, groups: Sequence[PlanGroup], tasks: Sequence[Task]) -> pl.DataFrame:
    """The rows of `items.parquet` of local tasks; items that were finished before are not repeated."""
    arms = arms_of(groups)
    frames = []
    total = len(arms) * sum(len(task.items) for task in tasks)
    with session.progress.task("tasks", total, "items") as advance:
        for index, task in enumerate(tasks):
            for arm in arms:
                for start in range(0, len(task.items), SHARD_ITEMS):
                    stop = min(start + SHARD_ITEMS, len(task.items))
                    shard = session.writer.shard(f"task-{index:02d}-{arm.place:03d}-{start:06d}.parquet")
                    if not shard.exists():
                        tables.write(shard, tables.frame(_score(session, task, arm, range(start, stop)), TaskItemRow))
                    frames.append(tables.read(shard, TaskItemRow))
                    advance(stop - start)
    return pl.concat(frames) if frames else tables.frame([], TaskItemRow)


def _score(session: Session, task: Task, arm: Arm, places: range) -> list[TaskItemRow]:
    sink = session.texts.quality.record.sink_tokens
    scorer = Continuations(
        session.loaded, None if arm.plan is None else arm.plan.gates(), sink, session.spec.dense_upto
    )
    rows: list[TaskItemRow] = []
    with _generating(session, task, arm):
        for place in places:
            item = task.items[place]
            found = (
                score_choice(scorer, task, item)
                if isinstance(item, Choice)
                else answer_question(session.loaded, task, item, session.spec.task_tokens, dense=arm.plan is None)
            )
            rows += [replace(row, plan=arm.name, replica=arm.replica, item=place) for row in found]
    return rows


def _generating(session: Session, task: Task, arm: Arm) -> AbstractContextManager[None]:
    """Decoded tokens run sparse while a generation task is scored."""
    if arm.plan is None or not isinstance(task.items[0], Question):
        return nullcontext()
    sink = session.texts.quality.record.sink_tokens
    return sparse_generation(session.loaded.sites, arm.plan.gates(), sink_tokens=sink)


def score_choice(scorer: Continuations, task: Task, item: Choice) -> list[TaskItemRow]:
    """`acc` and `acc_norm` of one multiple-choice item: the likeliest answer, also per character of the answer."""
    sums, sparse, scored = [], 0, 0
    for number, choice in enumerate(item.choices):
        context, continuation = encode_pair(scorer.loaded.tokenizer, task.examples + item.query, f" {choice}")
        if not context or not continuation:
            raise DataError(
                f"task {task.name}: choice {number} of '{item.query[:40]}' scores no token",
                "give a query and choices that have tokens of their own",
            )
        found = scorer.log_probs(context, continuation)
        targets = torch.tensor(continuation[-len(found.log_probs) :], device=found.log_probs.device)
        sums.append(float(found.log_probs.gather(1, targets[:, None]).double().sum()))
        sparse, scored = sparse + found.sparse, scored + len(targets)
    row = TaskItemRow(
        plan="", replica=0, task=task.name, item=0, metric="acc", filter="", value=0.0, answer="",
        gold=str(item.gold), scored_tokens=scored, sparse_tokens=sparse,
    )  # fmt: skip
    by_length = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
    return [_chosen(row, item, "acc", sums), _chosen(row, item, "acc_norm", by_length)]


def _chosen(row: TaskItemRow, item: Choice, metric: str, scores: list[float]) -> TaskItemRow:
    answer = max(range(len(scores)), key=lambda place: scores[place])
    return replace(row, metric=metric, answer=str(answer), value=float(answer == item.gold))


def answer_question(loaded: LoadedModel, task: Task, item: Question, room: int, *, dense: bool) -> list[TaskItemRow]:
    """`exact_match` of one generation item: greedy, until an end of text, a blank line or another question.

    The model decodes as it is set up by the caller; `dense` says that this is dense.
    """
    tokenizer = loaded.tokenizer
    ids = tokenizer(task.examples + item.prompt, verbose=False).input_ids
    limit = loaded.record.max_positions
    if limit is not None and room >= limit:
        raise DataError(
            f"{room} generated tokens leave no room for a question in the model's context of {limit}",
            "use a smaller --task-tokens",
        )
    ids = ids if limit is None else ids[-(limit - room) :]
    prompt = torch.tensor([ids], device=loaded.device)
    cache = new_cache(loaded.model, len(ids) + room)
    logits = prefill(loaded.model, prompt, cache)
    ends = _Ends(tokenizer)
    tokens = greedy(loaded.model, logits, cache, len(ids), room, ends)[0].tolist()
    text = shorten(str(tokenizer.decode(tokens, skip_special_tokens=True)))
    found, gold = final_number(text), final_number(item.answer)
    return [
        TaskItemRow(
            plan="",
            replica=0,
            task=task.name,
            item=0,
            metric="exact_match",
            filter="",
            value=float(found is not None and found == gold),
            answer=text,
            gold=str(gold),
            scored_tokens=len(tokens),
            sparse_tokens=0 if dense else len(tokens) - 1,
        )
    ]


class _Ends:
    """Whether a generated text is over; sees its tokens one by one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []

    def __call__(self, token: torch.Tensor) -> bool:
        self.tokens.append(int(token))
        text = str(self.tokenizer.decode(self.tokens)).lstrip()
        return self.tokens[-1] == self.tokenizer.eos_token_id or shorten(text) != text


def shorten(text: str) -> str:
    """A generated text up to the first place where it stops answering."""
    text = text.lstrip()
    return min((text.partition(stop)[0] for stop in STOPS), key=len)


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, encoded together and cut where the context ends.

    Spaces at the end of the context belong to the continuation (as lm-eval does it).
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole = list(tokenizer(context + continuation, verbose=False).input_ids)
    first = list(tokenizer(context, verbose=False).input_ids)
    return first, whole[len(first) :]
