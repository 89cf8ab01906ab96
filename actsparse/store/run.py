"""A run directory while it is written: created, resumed, refused or up to date, and never half finished.

`unfinished.json` marks a run at work; `manifest.json` is written last, so a directory that has one is complete.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from actsparse.errors import ActsparseError, RunError
from actsparse.results import SCHEMA_VERSION, FileRecord, Manifest, ModelRecord, Provenance, RunKind, TextRecord
from actsparse.store import provenance
from actsparse.store.codec import MAX_JSON_BYTES, builtins, decode, pretty
from actsparse.store.files import SHARDS, damaged_shards, disk_error, plain_bytes, sha256_of, write_bytes
from actsparse.store.fingerprint import differences, fingerprint

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
LOCK = ".lock"
COMPLETE = "complete"
LITTER = re.compile(r"\.tmp[A-Za-z0-9]{6}")
DUMP = re.compile(r"dump-\d{5}\.safetensors")
SHARD_SUFFIXES = ("", ".parquet", ".safetensors", ".json", ".tmp")
FILES = {
    RunKind.PROFILE: (
        "measures.parquet",
        "neurons.parquet",
        "heads.parquet",
        "neurons_decode.parquet",
        "heads_decode.parquet",
        "histograms.safetensors",
        "histograms_decode.safetensors",
        "coactivation.safetensors",
        "reservoir.safetensors",
        "probes.safetensors",
        "summary.json",
    ),
    RunKind.PLAN: ("plan.json", "plan.safetensors", "summary.json"),
    RunKind.EVAL: (
        "results.parquet",
        "tokens.parquet",
        "items.parquet",
        "timing.parquet",
        "throughput.parquet",
        "generations.jsonl",
        "vocabulary.json",
        "summary.json",
    ),
    RunKind.STUDY: ("studies.parquet", "studies.json", "summary.json"),
}


def dump_name(shard: int) -> str:
    """The name of a shard of raw activations."""
    return f"dump-{shard:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a stage is about to write: its kind, its identity, and where."""

    kind: RunKind
    identity: dict[str, Any]
    spec: Any
    model: ModelRecord | None
    texts: tuple[TextRecord, ...]
    output: Path | None
    root: Path
    device: str
    threads: int
    force: bool = False
    resume: bool = True

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.kind, self.identity)

    @property
    def directory(self) -> Path:
        if self.output is not None:
            return self.output
        model = self.model.resolved if self.model else "reports"
        return self.root / _directory_name(model) / f"{self.kind.value}-{self.fingerprint[:6]}"


@dataclass
class RunWriter:
    """An open run directory; `finish` makes it complete."""

    path: Path
    manifest: Manifest
    complete: bool = False
    resumed: bool = False
    warnings: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Keep a warning for the manifest, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def shard(self, name: str) -> Path:
        """The path of a shard; it exists when an earlier attempt finished it."""
        return self.path / SHARDS / name

    def keep(self, name: str) -> None:
        """Move a finished shard beside the tables: it becomes a file of the run."""
        os.replace(self.shard(name), self.path / name)
        self.kept.append(name)

    def finish(self) -> Manifest:
        """Write the manifest over every file of the run, and drop the shards."""
        files = tuple(
            FileRecord(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))
            for name in sorted({*FILES[self.manifest.kind], *self.kept})
            for path in [self.path / name]
            if path.is_file()
        )
        self.manifest = replace(
            self.manifest,
            status=COMPLETE,
            files=files,
            warnings=tuple(self.warnings),
            provenance=_finished(self.manifest.provenance),
        )
        write_bytes(self.path / MANIFEST, pretty(self.manifest).encode())
        _tidy(self.path)
        self.complete = True
        return self.manifest


@contextmanager
def open_run(request: RunRequest) -> Iterator[RunWriter]:
    """The run directory of `request`, locked while the block runs.

    `writer.complete` is True when the same run was finished before. Raises RunError where the directory holds another
    run, files that are not a run's, or where another process is writing it.
    """
    path = request.directory
    _make_directory(path)
    _refuse_links(path)
    lock = FileLock(str(path / LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{path} is being written by another process", "wait for it to end, or choose another --output"
        ) from None
    except OSError as error:
        raise disk_error(path, error) from None
    try:
        writer = _enter(path, request)
        try:
            yield writer
        except ActsparseError:
            # nothing was finished, so nothing is claimed: the next attempt may be another run
            if not writer.complete and not (path / SHARDS).is_dir():
                (path / UNFINISHED).unlink(missing_ok=True)
            raise
    except ActsparseError:
        _leave_nothing(path)
        raise
    finally:
        lock.release()


def _refuse_links(path: Path) -> None:
    """Refuse a directory in which a link would carry the lock, the manifest or the shards elsewhere."""
    for name in (LOCK, MANIFEST, UNFINISHED, SHARDS):
        if (path / name).is_symlink():
            raise RunError(
                f"{path / name} is a symbolic link, which a run does not follow",
                "remove the link, or choose another directory with --output",
            )


def _leave_nothing(path: Path) -> None:
    """Remove the lock where no run is, and the directory when nothing else is in it."""
    if (path / MANIFEST).exists() or (path / UNFINISHED).exists():
        return
    with suppress(OSError):
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete run; raises RunError naming what is wrong otherwise."""
    if not path.exists():
        raise RunError(f"there is no run at {path}", "list what was written with: ls runs/*/")
    if not path.is_dir():
        raise RunError(f"{path} is a file, not a run directory", "give the directory that holds its manifest.json")
    if not (path / MANIFEST).exists():
        if (path / UNFINISHED).exists():
            command = provenance.again(read_draft(path).provenance.command)
            raise RunError(f"the run at {path} is incomplete: it was interrupted", f"resume it with: {command}")
        raise RunError(f"{path} is not a run directory: it has no manifest.json", "give a directory under runs/")
    found = _read(path / MANIFEST)
    if found.status != COMPLETE:
        raise RunError(
            f"{path / MANIFEST} says that the run is {found.status}", "repeat the command that made it with --force"
        )
    return found


def read_draft(path: Path) -> Manifest:
    """The manifest of a run that is still at work or was interrupted."""
    return _read(path / UNFINISHED)


def remove_shards(path: Path) -> None:
    """Delete the shards of a run, and their folder when nothing else is in it."""
    folder = path / SHARDS
    if folder.is_dir() and not folder.is_symlink():
        for shard in folder.iterdir():
            if shard.is_file() and shard.suffix in SHARD_SUFFIXES:
                shard.unlink()
        with suppress(OSError):
            folder.rmdir()


def _tidy(path: Path) -> None:
    """Remove from a complete run what only a run at work needs; an earlier attempt may have ended just before."""
    (path / UNFINISHED).unlink(missing_ok=True)
    remove_shards(path)


def _sweep(path: Path) -> None:
    """Remove what a killed process of the safetensors library left: it writes beside our own temporary file."""
    for folder in (path, path / SHARDS):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if LITTER.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
                entry.unlink()


def _make_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a directory", "choose another place with --output")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def _enter(path: Path, request: RunRequest) -> RunWriter:
    draft = Manifest(
        kind=request.kind,
        status="unfinished",
        fingerprint=request.fingerprint,
        identity=builtins(request.identity),
        spec=builtins(request.spec),
        model=request.model,
        texts=request.texts,
        provenance=provenance.gather(device=request.device, threads=request.threads),
    )
    found = _existing(path, request.force)
    if found is not None:
        _sweep(path)
    if found is None and not ((path / MANIFEST).exists() or (path / UNFINISHED).exists()):
        _refuse_foreign_files(path, request)
    if found is not None and found.fingerprint != request.fingerprint and not request.force:
        raise RunError(_other_run(path, found, draft), "overwrite it with --force, or choose another --output")
    same = found is not None and found.fingerprint == request.fingerprint and not request.force
    if same and found and found.status == COMPLETE:
        _tidy(path)
        return RunWriter(path=path, manifest=found, complete=True, warnings=list(found.warnings))
    resumed = bool(same and request.resume and (path / SHARDS).is_dir())
    if not resumed:
        _remove_run(path, {request.kind, *((found.kind,) if found else ())}, found)
    writer = RunWriter(path=path, manifest=draft, resumed=resumed)
    for shard in damaged_shards(path / SHARDS) if resumed else ():
        shard.unlink()
        writer.warn(f"the shard {shard.name} was damaged since it was written, and was made again")
    write_bytes(path / UNFINISHED, pretty(draft).encode())
    return writer


def _existing(path: Path, force: bool) -> Manifest | None:
    """The manifest that is there; with `force`, one that cannot be read counts as none."""
    for name in (MANIFEST, UNFINISHED):
        if (path / name).exists():
            try:
                return _read(path / name)
            except RunError:
                if not force:
                    raise
    return None


def _read(file: Path) -> Manifest:
    found = decode(plain_bytes(file, MAX_JSON_BYTES), Manifest, str(file))
    if found.schema_version != SCHEMA_VERSION:
        raise RunError(
            f"{file} has schema {found.schema_version}, this version of actsparse writes {SCHEMA_VERSION}",
            "repeat the command that made the run with --force, or use the version that wrote it",
        )
    return found


def _refuse_foreign_files(path: Path, request: RunRequest) -> None:
    """Refuse a directory that holds something else; with `force`, only where a name of ours is taken."""
    ours = {LOCK, f"{MANIFEST}.tmp", f"{UNFINISHED}.tmp"}
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ours)
    if request.force:
        foreign = [name for name in foreign if name in (*FILES[request.kind], SHARDS)]
    if foreign:
        raise RunError(
            f"{path} holds files that are not a run's ({', '.join(foreign[:3])})",
            "choose an empty directory with --output; files that are not ours are never touched",
        )


def _other_run(path: Path, found: Manifest, draft: Manifest) -> str:
    if found.kind != draft.kind:
        return f"{path} holds a run of kind '{found.kind}', not '{draft.kind}'"
    lines = differences({"kind": found.kind, **found.identity}, {"kind": draft.kind, **draft.identity})
    return "\n  ".join([f"{path} holds another run:", *lines[:12], *(["..."] if len(lines) > 12 else [])])


def _remove_run(path: Path, kinds: set[RunKind], found: Manifest | None) -> None:
    """Remove what earlier runs of these kinds wrote here, and nothing else."""
    dumps = {file.path for file in found.files if DUMP.fullmatch(file.path)} if found else set()
    if found and found.status != COMPLETE:
        dumps |= {file.name for file in path.iterdir() if DUMP.fullmatch(file.name)}
    for name in (MANIFEST, UNFINISHED, *dumps, *(name for kind in kinds for name in FILES[kind])):
        target = path / name
        if target.is_file() and not target.is_symlink():
            target.unlink()
    remove_shards(path)


def _finished(started: Provenance) -> Provenance:
    finished = provenance.now()
    seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started.started)).total_seconds()
    return replace(started, finished=finished, seconds=max(0.0, seconds))


def _directory_name(model: str) -> str:
    name = model.replace("\\", "/").rstrip("/").split("/")[-1]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".") or "model"
