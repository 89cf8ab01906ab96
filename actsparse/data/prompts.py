"""Prompts from files: text, JSON lines, or folders of them.

A `.txt` file holds prompts separated by blank lines; a `.jsonl` file holds one object a line with `text`, `prompt` or
`messages`; a folder is read in the order of its file names (`.txt` and `.jsonl`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.data.json_lines import check_text, parse_line
from actsparse.errors import DataError

TEXT_FIELDS = ("text", "prompt")
SUFFIXES = (".txt", ".jsonl")
BOM = "\ufeff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it was read: plain text, or chat messages that the model's template renders."""

    source: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def content(self) -> str:
        """The words of the prompt, without a chat template."""
        return self.text or "\n".join(message["content"] for message in self.messages)


def sample_prompts() -> Path:
    """The folder of the shipped sample prompts."""
    return Path(__file__).resolve().parents[1] / "sample_prompts"


def read_prompts(paths: Iterable[str]) -> list[Prompt]:
    """The prompts at `paths` in order; raises DataError naming the file, and the line where one is at fault."""
    prompts = [prompt for path in paths for file in _files(Path(path).expanduser()) for prompt in _read(file)]
    if not prompts:
        raise DataError("there is no prompt to read", "give a file or folder with text: --prompts PATH")
    return prompts


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"the folder {path} has no .txt or .jsonl file", "put prompts there, or give a file")
        return files
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}", "check the path given with --prompts")
    return [path]


def _read(file: Path) -> list[Prompt]:
    text = read_text(file)
    if file.suffix == ".json":
        raise DataError(
            f"{file} is JSON, not JSON lines", "write one object a line into a .jsonl file, or use --dataset"
        )
    if file.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [_parse_line(line, f"{file}:{number}") for number, line in lines if line.strip()]
    paragraphs = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
    return [Prompt(source=file.name, text=part.strip("\n")) for part in paragraphs if part.strip()]


def read_text(file: Path) -> str:
    """The text of a file, UTF-8, without the mark that some editors begin it with.

    Raises DataError where it is empty or undecodable.
    """
    try:
        text = file.read_bytes().decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start})", f"convert it: iconv -f latin1 -t utf-8 {file} > utf8.txt"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "check the path and its permissions") from None
    if not text.strip():
        raise DataError(f"{file} is empty", "give a file with text in it")
    return text


def _parse_line(line: str, where: str) -> Prompt:
    fields = parse_line(line, where)
    if not isinstance(fields, dict):
        raise DataError(f"{where} is not a JSON object", 'write one object a line: {"text": "..."}')
    prompt = prompt_of(fields, where)
    check_text(prompt.content, where)
    return prompt


def prompt_of(fields: dict[str, Any], where: str) -> Prompt:
    """The prompt of one object: its `text`, `prompt` or `messages`; raises DataError where none of them holds text."""
    for name in TEXT_FIELDS:
        if isinstance(fields.get(name), str) and fields[name].strip():
            return Prompt(source=where, text=fields[name])
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        plain = tuple({"role": message["role"], "content": message["content"]} for message in messages)
        return Prompt(source=where, messages=plain)
    raise DataError(
        f"{where} has no text: none of the fields text, prompt or messages holds any",
        'write one object a line: {"text": "..."}',
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
