"""The tasks of an evaluation: files of one's own and those of lm-eval, read, known by content, and scored."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from actsparse.data.tasks import Task, read_task
from actsparse.errors import DataError
from actsparse.pipelines.harness_tasks import check_installed, score_harness
from actsparse.pipelines.plans import PlanGroup
from actsparse.pipelines.session import Session
from actsparse.pipelines.task_scoring import score_tasks
from actsparse.pipelines.task_tables import not_exercised
from actsparse.specs import EvalSpec


def read_tasks(spec: EvalSpec) -> list[Task]:
    """The local tasks of an evaluation, after a check that the others can be run; raises ActsparseError otherwise."""
    tasks = [read_task(path, limit=spec.task_limit, shots=spec.shots) for path in spec.task_files]
    names = [task.name for task in tasks] + list(spec.tasks)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two tasks are called '{twice}'", "give each once, and files different names")
    if spec.tasks:
        check_installed()
        from actsparse.pipelines.harness import check_tasks

        check_tasks(spec.tasks, spec.include_path)
    return tasks


def tasks_identity(spec: EvalSpec, tasks: Sequence[Task]) -> dict[str, Any]:
    """What tasks are known by: the content of their items, not their paths."""
    return {
        "task_files": [hashlib.sha256(repr(task).encode()).hexdigest() for task in tasks],
        "include_path": _folder_hash(spec.include_path),
    }


def score_all_tasks(session: Session, groups: Sequence[PlanGroup], tasks: Sequence[Task]) -> pl.DataFrame:
    """The rows of `items.parquet`: local tasks, then lm-eval's; a task that no plan exercises is a warning."""
    items = score_tasks(session, groups, tasks)
    if session.spec.tasks:
        items = pl.concat([items, score_harness(session, groups)])
    for text in not_exercised(items):
        session.warn(text)
    return items


def _folder_hash(path: str | None) -> str | None:
    if path is None:
        return None
    digest = hashlib.sha256()
    folder = Path(path).expanduser()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
