"""The options that commands share, as groups: a command takes a group as one argument and the decorator expands it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from actsparse.errors import ActsparseError
from actsparse.specs import DataSpec, ModelSpec

LAST_LAYER = 9_999
MOST_DIGITS = 12

MODEL, DATA, RUN, OUTPUT = "Model", "Text", "Run", "Output"


def option(*names: str, help: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=True)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[
        str, option("--model", "-m", help="Hub id, directory, .gguf file, smollm2, demo, demo:relu.", panel=MODEL)
    ]
    revision: Annotated[str | None, option("--revision", help="Commit, tag or branch on the hub.", panel=MODEL)] = None
    dtype: Annotated[
        str, option("--dtype", help="auto, float32, bfloat16, float16. auto on a CPU: float32.", panel=MODEL)
    ] = "auto"
    device: Annotated[str, option("--device", help="auto, cpu, cuda, cuda:N.", panel=MODEL)] = "auto"
    device_map: Annotated[
        str | None,
        option("--device-map", help="Spread a model larger than one device: auto, balanced, sequential.", panel=MODEL),
    ] = None
    dequantize: Annotated[
        bool, option("--dequantize", help="Unpack a quantised checkpoint while loading.", panel=MODEL)
    ] = False
    trust_remote_code: Annotated[
        bool, option("--trust-remote-code", help="Run code that comes with the model. Off by default.", panel=MODEL)
    ] = False
    allow_pickle: Annotated[
        bool,
        option("--allow-pickle", help="Read pickled weights where there are no others; tensors alone.", panel=MODEL),
    ] = False
    offline: Annotated[bool, option("--offline", help="Use no network.", panel=MODEL)] = False
    family: Annotated[
        Path | None, option("--family", help="TOML file with the row of a family that the table lacks.", panel=MODEL)
    ] = None

    def spec(self) -> ModelSpec:
        return ModelSpec(
            name=self.model,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            dequantize=self.dequantize,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
            offline=self.offline,
            family=None if self.family is None else str(self.family.expanduser().resolve()),
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which text, and how it is cut."""

    prompts: Annotated[
        list[str] | None, option("--prompts", help="File or folder: one sequence a prompt. Repeatable.", panel=DATA)
    ] = None
    corpus: Annotated[str | None, option("--corpus", help="One text, cut into blocks.", panel=DATA)] = None
    calib: Annotated[str | None, option("--calib", help="Another text to fit methods on.", panel=DATA)] = None
    dataset: Annotated[
        str | None,
        option("--dataset", help="A data set: hub id[:CONFIG], or a csv, json, parquet, text file.", panel=DATA),
    ] = None
    split: Annotated[str, option("--split", help="Split of the data set.", panel=DATA)] = "test"
    text_column: Annotated[str, option("--text-column", help="Column that holds the text.", panel=DATA)] = "text"
    limit: Annotated[
        int | None, option("--limit", "-n", help="Number of sequences: prompts, or blocks of the corpus.", panel=DATA)
    ] = None
    block_length: Annotated[
        int | None, option("--block-length", help="Tokens of a block, S. [512; prompts joined: 256]", panel=DATA)
    ] = None
    prompt_length: Annotated[
        int | None, option("--prompt-length", help="Dense tokens of a block, P. [256; joined: 128]", panel=DATA)
    ] = None
    prompt_frac: Annotated[
        str | None,
        option("--prompt-frac", help="Dense share of a block instead; 0: all after the sink tokens is sparse.",
               panel=DATA),
    ] = None  # fmt: skip
    calib_blocks: Annotated[str | None, option("--calib-blocks", help="Blocks to fit on, A:B. [N:2N]", panel=DATA)] = (
        None
    )
    sink_tokens: Annotated[
        int, option("--sink-tokens", help="First positions, kept dense and out of statistics.", panel=DATA)
    ] = 4
    seed: Annotated[
        int, option("--seed", help="Seed of every random choice: samples, shuffles, bootstrap.", panel=DATA)
    ] = 0

    def spec(self, part: str = "all") -> DataSpec:
        at_least(1, {"--limit": self.limit, "--block-length": self.block_length, "--prompt-length": self.prompt_length})
        at_least(0, {"--sink-tokens": self.sink_tokens, "--seed": self.seed})
        if self.prompt_length is not None and self.prompt_frac is not None:
            raise ActsparseError("both --prompt-length and --prompt-frac are given", "give one of the two")
        if self.corpus and self.dataset:
            raise ActsparseError("both --corpus and --dataset are given", "give one of the two")
        if self.prompts and self.dataset:
            raise ActsparseError("both --prompts and --dataset are given", "give one of the two")
        return DataSpec(
            prompts=tuple(self.prompts or ()),
            corpus=self.corpus,
            calib=self.calib,
            dataset=self.dataset,
            split=self.split,
            text_column=self.text_column,
            limit=self.limit,
            block_length=self.block_length,
            prompt_length=self.prompt_length,
            prompt_frac=None if self.prompt_frac is None else share(self.prompt_frac, "--prompt-frac"),
            calib_blocks=block_range(self.calib_blocks),
            sink_tokens=self.sink_tokens,
            part=part,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is written, and how it is carried out."""

    output: Annotated[Path | None, option("--output", "-o", help="Run directory. [runs/MODEL/KIND]", panel=RUN)] = None
    force: Annotated[bool, option("--force", help="Overwrite what an earlier run wrote.", panel=RUN)] = False
    resume: Annotated[bool, option("--resume/--no-resume", help="Go on with an interrupted run.", panel=RUN)] = True


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed."""

    json: Annotated[bool, option("--json", help="Print one JSON document on stdout.", panel=OUTPUT)] = False
    quiet: Annotated[bool, option("--quiet", "-q", help="No progress and no notes.", panel=OUTPUT)] = False
    verbose: Annotated[
        bool, option("--verbose", "-v", help="The model's shape, and how long each step took.", panel=OUTPUT)
    ] = False
    debug: Annotated[bool, option("--debug", help="Show the stack trace of an error.", panel=OUTPUT)] = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every argument that is an option group expanded into its options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if inspect.isclass(hint) and is_dataclass(hint)
    }
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        typed = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                part.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if part.default is MISSING else part.default,
                annotation=typed[part.name],
            )
            for part in fields(groups[name])
        ]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{part.name: values.pop(part.name) for part in fields(group)})
        command(**values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    expanded.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


def at_least(least: int, given: dict[str, int | None]) -> None:
    """Raise ActsparseError naming the first option that is given and smaller."""
    for name, value in given.items():
        if value is not None and value < least:
            raise ActsparseError(f"{name} must be at least {least}, not {value}", f"write {name} {least} or more")


def is_whole(text: str) -> bool:
    """Whether a text is a whole number that may be meant: digits, and not too many of them."""
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def block_range(text: str | None) -> tuple[int, int] | None:
    """`A:B` as two numbers; raises ActsparseError otherwise."""
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not colon or not is_whole(first) or not is_whole(stop) or int(first) >= int(stop):
        raise ActsparseError(f"--calib-blocks must be A:B with A < B, not '{text}'", "write for example 4:8")
    return int(first), int(stop)


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """`0-7,31` as layer numbers; raises ActsparseError otherwise."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not is_whole(first) or (dash and not is_whole(last)):
            raise ActsparseError(f"--layers cannot be '{text}'", "write for example 0-7,31")
        if dash and int(last) < int(first):
            raise ActsparseError(
                f"--layers cannot be '{text}': {part.strip()} goes backwards", "write for example 0-7,31"
            )
        if int(last if dash else first) > LAST_LAYER:
            raise ActsparseError(f"--layers cannot be '{text}': no model has so many", "write for example 0-7,31")
        layers += range(int(first), int(last if dash else first) + 1)
    return tuple(sorted(set(layers)))


def counts(text: str, name: str) -> tuple[int, ...]:
    """`1,2,4` as numbers from 1 on, ascending; raises ActsparseError otherwise."""
    parts = [part.strip() for part in text.split(",")]
    if not all(is_whole(part) and int(part) for part in parts):
        raise ActsparseError(f"{name} must be numbers from 1 on, not '{text}'", f"write for example {name} 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def shares(text: str, name: str) -> tuple[float, ...]:
    """`0.1,20%` as numbers between 0 and 1; raises ActsparseError otherwise."""
    return tuple(share(part, name) for part in text.split(","))


def share(text: str, name: str) -> float:
    """`0.05` or `5%` as a number in [0, 1); raises ActsparseError otherwise."""
    from actsparse.methods.short import parse_share

    return parse_share(text, name)
