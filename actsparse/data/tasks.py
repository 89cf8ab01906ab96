"""Tasks from JSON lines: multiple choice (`query`, `choices`, `gold`), or generation (`question`, `answer`)."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from actsparse.data.json_lines import check_text, parse_line
from actsparse.data.prompts import read_text
from actsparse.errors import DataError

QUESTION = "Question: {question}\nAnswer:"
BETWEEN = "\n\n"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
FINAL = "####"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A multiple-choice item: the likeliest of `choices` after `query` is the answer; `gold` is the index of the right
    one."""

    query: str
    choices: tuple[str, ...]
    gold: int

    @property
    def shown(self) -> str:
        """The item as an example, with its answer."""
        return f"{self.query} {self.choices[self.gold]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A generation item: the text after `question` is right when its final number is that of `answer`."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model continues."""
        return QUESTION.format(question=self.question)

    @property
    def shown(self) -> str:
        """The item as an example, with its answer."""
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Task:
    """The items of one file, all of one kind; `examples` stand in front of every item's text and are not scored."""

    name: str
    items: tuple[Choice, ...] | tuple[Question, ...]
    examples: str = ""


def read_task(path: str, *, limit: int | None = None, shots: int = 0) -> Task:
    """The task in a JSON-lines file: its first `shots` items as examples, then `limit` items (None: all).

    Raises DataError naming the line where one is broken, of another kind than the first, or has no right answer.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no task file {file}", "check the path given with --task")
    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    wanted = lines if limit is None else lines[: shots + limit]
    items = [_item(line, f"{file}:{number}") for number, line in wanted]
    for (number, _), item in zip(wanted, items, strict=True):
        check_text("".join((item.shown, *(item.choices if isinstance(item, Choice) else ()))), f"{file}:{number}")
    for (number, _), item in zip(wanted, items, strict=True):
        if type(item) is not type(items[0]):
            raise DataError(
                f"{file}:{number} is of another kind than the file's first item",
                "keep multiple choice and generation in files of their own",
            )
    if len(items) <= shots:
        raise DataError(f"{file} has {len(items)} items, and {shots} are examples", "give more items, or fewer --shots")
    examples = "".join(item.shown + BETWEEN for item in items[:shots])
    return Task(file.stem, tuple(items[shots:]), examples)  # pyright: ignore[reportArgumentType]


def final_number(text: str) -> Decimal | None:
    """The number that a text ends on: the first after `####` where it has one, else its last; None without any."""
    _, mark, after = text.rpartition(FINAL)
    found = NUMBER.findall(after if mark else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _item(line: str, where: str) -> Choice | Question:
    fields = parse_line(line, where)
    if isinstance(fields, dict) and {"query", "choices", "gold"} <= fields.keys():
        return _choice(fields, where)
    if isinstance(fields, dict) and {"question", "answer"} <= fields.keys():
        return _question(fields, where)
    raise DataError(
        f"{where} is no task item: it has neither query, choices and gold, nor question and answer",
        'write {"query": "...", "choices": ["...", "..."], "gold": 0} or {"question": "...", "answer": "..."}',
    )


def _choice(fields: dict[str, Any], where: str) -> Choice:
    query, choices, gold = fields["query"], fields["choices"], fields["gold"]
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"{where}: the query is empty or no text", "give a text that the choices continue")
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise DataError(f"{where}: choices must be a list of texts, none of them empty", "correct the line")
    if len(choices) < 2:
        raise DataError(f"{where}: there is nothing to choose from, choices has {len(choices)}", "give two or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(
            f"{where}: gold is {gold!r}, and the choices are numbered 0 to {len(choices) - 1}", "correct the index"
        )
    return Choice(query=query, choices=tuple(choices), gold=gold)


def _question(fields: dict[str, Any], where: str) -> Question:
    question, answer = fields["question"], fields["answer"]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: the question is empty or no text", "correct the line")
    text = str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    if not isinstance(text, str) or final_number(text) is None:
        raise DataError(f"{where}: the answer holds no number to compare with", "end it with the number: #### 18")
    return Question(question=question, answer=text)


def parse_dense_upto(text: str) -> int:
    """`P` as 0, `P-k` as k: how many of the context's last tokens are sparse; raises DataError otherwise."""
    head, minus, tail = text.strip().upper().replace(" ", "").partition("-")
    if head == "P" and (not minus or (tail.isascii() and tail.isdigit() and len(tail) < 10)):
        return int(tail or 0)
    raise DataError(f"--dense-upto cannot be '{text}'", "write P (the whole context dense) or P-1")
