"""Task files: what they hold, and which line is at fault."""

from decimal import Decimal
from pathlib import Path

import pytest

from actsparse.data.tasks import Choice, Question, final_number, parse_dense_upto, read_task
from actsparse.errors import DataError

GOOD = '{"query": "w1 w2", "choices": ["w3", "w4 w5"], "gold": 1}'
SUM = '{"question": "1 and 2?", "answer": "so #### 3"}'


def task_file(folder: Path, *lines: str) -> str:
    path = folder / "own.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_both_kinds_are_read(tmp_path: Path) -> None:
    task = read_task(task_file(tmp_path, GOOD, "", GOOD))
    assert task.name == "own"
    assert task.items == (Choice(query="w1 w2", choices=("w3", "w4 w5"), gold=1),) * 2
    question = read_task(task_file(tmp_path, SUM)).items[0]
    assert isinstance(question, Question)
    assert question.prompt == "Question: 1 and 2?\nAnswer:"


def test_examples_come_first_and_are_not_scored(tmp_path: Path) -> None:
    other = GOOD.replace('"gold": 1', '"gold": 0')
    task = read_task(task_file(tmp_path, GOOD, other, other), shots=1, limit=1)
    assert task.examples == "w1 w2 w4 w5\n\n"
    assert [item.gold for item in task.items if isinstance(item, Choice)] == [0]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ('{"query": "w1", "choices": ["w2"', "is not JSON"),
        ('{"query": "w1", "choices": ["w2", "w3"], "gold": 2}', "numbered 0 to 1"),
        ('{"query": "w1", "choices": ["w2", "w3"], "gold": -1}', "gold is -1"),
        ('{"query": "w1", "choices": ["w2", "w3"], "gold": true}', "gold is True"),
        ('{"query": "w1", "choices": ["w2"], "gold": 0}', "nothing to choose from"),
        ('{"query": "w1", "choices": ["w2", ""], "gold": 0}', "none of them empty"),
        ('{"query": " ", "choices": ["w2", "w3"], "gold": 0}', "query is empty"),
        ('{"question": "how many?", "answer": "none"}', "no number"),
        ('{"question": "", "answer": "1"}', "question is empty"),
        ('{"text": "w1"}', "no task item"),
        ("[1]", "no task item"),
        (SUM, "another kind"),
    ],
)
def test_a_broken_line_is_named(bad: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_task(task_file(tmp_path, GOOD, bad))
    assert "own.jsonl:2" in error.value.what
    assert named in error.value.what
    assert error.value.hint


def test_a_missing_file_and_too_many_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task file"):
        read_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="are examples"):
        read_task(task_file(tmp_path, GOOD), shots=1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("she makes $1,250.50 a year, of 7 days", "7"),
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234 dollars and 5 cents", "1234"),
        ("it is -3.", "-3"),
        ("so .5 of it", "0.5"),
        ("18.0", "18"),
        ("none at all", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_dense_upto() -> None:
    assert [parse_dense_upto(text) for text in ("P", "p-1", "P - 3")] == [0, 1, 3]
    for text in ("", "P+1", "3", "P-x"):
        with pytest.raises(DataError, match="--dense-upto"):
            parse_dense_upto(text)
