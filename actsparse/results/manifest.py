"""What every run directory says of itself: kind, texts, provenance and files (`manifest.json`)."""

from dataclasses import dataclass
from enum import StrEnum

from actsparse.results.model import ModelRecord

SCHEMA_VERSION = 2


class RunKind(StrEnum):
    PROFILE = "profile"
    PLAN = "plan"
    EVAL = "eval"
    STUDY = "study"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """A text that was read: where from, how it was cut, and the hash of the token ids that it became.

    `sequences` blocks or prompts of `tokens` tokens in all; for blocks `block_length`, `prompt_length` and the
    half-open range `blocks`. `window_hashes` are a sample of 16-token windows, by which two texts are seen to overlap.
    """

    role: str
    source: str
    sha256: str
    sequences: int
    tokens: int
    block_length: int | None = None
    prompt_length: int | None = None
    blocks: tuple[int, int] | None = None
    sink_tokens: int = 4
    window_hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Who made a run, with what, when and where."""

    actsparse: str
    python: str
    packages: dict[str, str]
    platform: str
    processor: str
    device: str
    threads: int
    git_commit: str | None
    command: tuple[str, ...]
    started: str
    finished: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`, written last: a directory that has one is complete."""

    schema_version: int = SCHEMA_VERSION
    kind: RunKind
    status: str
    fingerprint: str
    identity: dict[str, object]
    spec: dict[str, object]
    model: ModelRecord | None
    texts: tuple[TextRecord, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    files: tuple[FileRecord, ...] = ()
