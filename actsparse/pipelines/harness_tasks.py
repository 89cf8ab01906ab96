"""lm-eval's tasks inside an evaluation: dense and every plan, item by item, with the intervals of local tasks."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import polars as pl

from actsparse.errors import DataError, PlanError, reason_of
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.pipelines.task_scoring import Arm, arms_of
from actsparse.results import TaskItemRow
from actsparse.store import tables


def check_installed() -> None:
    """Raise PlanError where lm-eval is not there."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise PlanError("--tasks needs lm-eval, which is not installed", "pip install 'actsparse[eval]'")


def score_harness(session: Session, groups: Sequence[PlanGroup]) -> pl.DataFrame:
    """The rows of `items.parquet` of `--tasks`; plans that were finished before are not repeated."""
    check_installed()
    with _quiet():
        frames = _score_all(session, groups)
    return pl.concat(frames) if frames else tables.frame([], TaskItemRow)


def _score_all(session: Session, groups: Sequence[PlanGroup]) -> list[pl.DataFrame]:
    from actsparse.pipelines.harness import check_tasks

    names = session.spec.tasks
    manager = check_tasks(names, session.spec.include_path)
    arms = arms_of(groups)
    frames = []
    with session.progress.task("lm-eval tasks", len(arms) * len(names), "runs") as advance:
        for index, name in enumerate(names):
            for arm in arms:
                shard = session.writer.shard(f"lm-eval-{index:02d}-{arm.place:03d}.parquet")
                if not shard.exists():
                    rows = _score(session, manager, name, arm)
                    tables.write(shard, tables.frame(rows, TaskItemRow))
                frames.append(tables.read(shard, TaskItemRow))
                advance(1)
    return frames


def _score(session: Session, manager: Any, name: str, arm: Arm) -> list[TaskItemRow]:
    from lm_eval.evaluator import simple_evaluate

    from actsparse.pipelines.harness import PlanLM

    spec = session.spec
    sink = session.texts.quality.record.sink_tokens
    lm = PlanLM(session.loaded, arm.plan, sink_tokens=sink, back=spec.dense_upto)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=manager,
            limit=spec.task_limit,
            num_fewshot=spec.shots or None,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=spec.data.seed,
            numpy_random_seed=spec.data.seed,
            torch_random_seed=spec.data.seed,
            fewshot_random_seed=spec.data.seed,
        )
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"lm-eval could not run '{name}': {reason_of(error)}",
            "offline, give tasks whose data lies here: --include-path FOLDER with dataset_path: json",
        ) from None
    samples: dict[str, list[Any]] = (found or {}).get("samples", {})
    rows = [
        _row(arm, task, metric, sample, lm)
        for task, of_task in samples.items()
        for sample in of_task
        for metric in sample["metrics"]
        if isinstance(sample[metric], Real)
    ]
    if not rows:
        raise DataError(
            f"'{name}' has no metric that is a number an item", "read it from lm_eval itself: lm_eval --model actsparse"
        )
    return rows


def _row(arm: Arm, task: str, metric: str, sample: dict[str, Any], lm: Any) -> TaskItemRow:
    raw = sample["resps"][0][0]
    scored, sparse = lm.counted(sample["arguments"])
    return TaskItemRow(
        plan=arm.name,
        replica=arm.replica,
        task=task,
        item=int(sample["doc_id"]),
        metric=metric,
        filter="" if sample["filter"] == "none" else str(sample["filter"]),
        value=float(sample[metric]),
        answer=raw if isinstance(raw, str) else "",
        gold=str(sample["target"]),
        scored_tokens=scored,
        sparse_tokens=sparse,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval speaks through logging; warnings of its models are none of a user's concern here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
