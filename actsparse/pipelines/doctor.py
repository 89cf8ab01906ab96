"""`doctor`: what is installed, what this machine has, and whether the core of the toolkit works on it."""

import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from actsparse import __version__
from actsparse.core.native import cuda_compiler
from actsparse.engine.cpu import build
from actsparse.engine.timing import read_bandwidth
from actsparse.errors import ActsparseError
from actsparse.models.home import home
from actsparse.models.load import resolve_device
from actsparse.models.room import room
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.profile import profile
from actsparse.pipelines.progress import Progress, Silent
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec
from actsparse.store.provenance import processor

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "polars", "plotly", "datasets", "gguf")
EXTRAS = {
    "lm_eval": ("evaluate --tasks", 'pip install "actsparse[eval]"'),
    "triton": ("the CUDA kernels", "pip install triton"),
}
MODEL = "demo"
PLAN = "griffin@0.5"
SENTENCE = "the old bridge over a grey river stood where many small boats went by and people walked home"
TOLERANCE = 1e-3
LEAST_DISK = 2**30


class Health(StrEnum):
    """`note`: something optional is not there; `broken`: something that every command needs fails."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a diagnosis: what was looked at, what was found, and what to do where it is not well."""

    group: str
    name: str
    value: str
    health: Health = Health.OK
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Every check in order; `bandwidth_gb_per_s`: what the self-test read from memory a second, None without it."""

    checks: tuple[Check, ...]
    bandwidth_gb_per_s: float | None

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(check.health is not Health.BROKEN for check in self.checks)


def doctor(device: str = "auto", progress: Progress | None = None) -> Diagnosis:
    """What is found on this machine. Nothing is written but temporary files and the cache of compiled operators."""
    progress = progress or Silent()
    checks = [*_versions(), *_devices(), *_compilers(), *_places()]
    tested, bandwidth = _self_test(device, progress)
    return Diagnosis(checks=(*checks, *tested), bandwidth_gb_per_s=bandwidth)


def _versions() -> Iterator[Check]:
    yield Check(group="versions", name="actsparse", value=__version__)
    yield Check(group="versions", name="python", value=f"{platform.python_version()} ({platform.platform()})")
    for name in REQUIRED:
        found = _installed(name)
        yield Check(
            group="versions", name=name, value=found or "not installed", health=Health.OK if found else Health.BROKEN,
            hint="" if found else f"pip install {name}",
        )  # fmt: skip
    for name, (serves, hint) in EXTRAS.items():
        found = _installed(name)
        yield Check(
            group="versions", name=name, value=found or f"not installed ({serves})",
            health=Health.OK if found else Health.NOTE, hint="" if found else hint,
        )  # fmt: skip


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    free = room()
    said = "" if free is None else f", {free.bytes / 1e9:.1f} GB of memory free in {free.where}"
    yield Check(group="devices", name="cpu", value=f"{processor()}, {torch.get_num_threads()} threads{said}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Check(
            group="devices",
            name=f"cuda:{index}",
            value=f"{found.name}, {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}",
        )
    if not torch.cuda.device_count():
        yield Check(
            group="devices", name="cuda", value=f"none (torch is built for CUDA {torch.version.cuda or 'never'})"
        )


def _compilers() -> Iterator[Check]:
    reason = build.failure()
    yield Check(
        group="compilers", name="cpu operators", value="compiled" if reason is None else reason.splitlines()[0],
        health=Health.OK if reason is None else Health.NOTE,
        hint="" if reason is None else "torch does their work, more slowly; install a C++ compiler such as g++",
    )  # fmt: skip
    if torch.cuda.device_count():
        nvcc = cuda_compiler()
        yield Check(
            group="compilers", name="nvcc", value=nvcc or "not found", health=Health.OK if nvcc else Health.NOTE,
            hint="" if nvcc else "CUDA operators of ours are then left out; install the CUDA toolkit",
        )  # fmt: skip


def _places() -> Iterator[Check]:
    yield _writable("cache (ACTSPARSE_HOME)", home, "set ACTSPARSE_HOME to a writable directory")
    yield _writable("temporary files", lambda: Path(tempfile.gettempdir()), "set TMPDIR to a writable directory")
    yield _writable("working directory", Path.cwd, "runs go to ./runs: change the directory, or use --output")


def _writable(name: str, place: Callable[[], Path], hint: str) -> Check:
    """Whether a folder can be written, tried rather than asked: modes do not bind everybody."""
    try:
        folder = place()
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, ActsparseError) as error:
        said = error.what if isinstance(error, ActsparseError) else f"{error.strerror or error}"
        return Check(group="places", name=name, value=f"cannot be written: {said}", health=Health.NOTE, hint=hint)
    scarce = free < LEAST_DISK
    return Check(
        group="places", name=name, value=f"{folder} ({free / 1e9:.1f} GB free)",
        health=Health.NOTE if scarce else Health.OK, hint="free some space" if scarce else "",
    )  # fmt: skip


def _self_test(device: str, progress: Progress) -> tuple[list[Check], float | None]:
    """The shipped model recorded and decoded sparsely, and how fast memory is read where it was."""
    checks, bandwidth = [], None
    try:
        where = str(resolve_device(device))
        with tempfile.TemporaryDirectory(prefix="actsparse-doctor-") as folder:
            for test in (_records, _decodes):
                progress.note(f"self-test on {where}: {test.__doc__}")
                checks.append(test(Path(folder), where))
        bandwidth = read_bandwidth(resolve_device(device)) / 1e9
        checks.append(Check(group="self-test", name="memory bandwidth", value=f"{bandwidth:.1f} GB/s on {where}"))
    except Exception as error:  # whatever is wrong with this machine is what is looked for
        said = error.what if isinstance(error, ActsparseError) else f"{type(error).__name__}: {error}"
        hint = error.hint if isinstance(error, ActsparseError) else "report it with what this command prints"
        checks.append(Check(group="self-test", name="failed", value=said, health=Health.BROKEN, hint=hint))
    return checks, bandwidth


def _text(folder: Path) -> DataSpec:
    """Seven prompts of 40 words, the same everywhere."""
    words = re.findall(r"\w+", SENTENCE)
    path = folder / "prompts.txt"
    lines = (" ".join(words[(i * 5 + j) % len(words)] for j in range(40)) for i in range(7))
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return DataSpec(prompts=(str(path),), block_length=32, prompt_length=16)


def _records(folder: Path, device: str) -> Check:
    """record activations."""
    spec = ProfileSpec(
        model=ModelSpec(name=MODEL, device=device, offline=True),
        data=_text(folder),
        probes=(),
        output=folder / "profile",
    )
    run = profile(spec)
    shape = run.manifest.model
    whole = shape is not None and run.neurons.height == shape.layers * shape.intermediate_size
    return Check(
        group="self-test", name="record", value=f"{run.neurons.height} neurons of {MODEL}",
        health=Health.OK if whole and not run.warnings else Health.BROKEN,
        hint="" if whole else "report it with what this command prints",
    )  # fmt: skip


def _decodes(folder: Path, device: str) -> Check:
    """decode sparsely, in an engine and with masks."""
    spec = EvalSpec(
        model=ModelSpec(name=MODEL, device=device, offline=True), data=_text(folder), plans=(PLAN,), controls=False,
        timing_pairs=1, timing_tokens=4, generations=1, max_new_tokens=4, output=folder / "eval",
    )  # fmt: skip
    rows = evaluate(spec).results.filter(plan=PLAN, metric="path_check")["value"]
    difference = rows[0] if len(rows) else None
    equal = difference is not None and difference <= TOLERANCE
    value = (
        "was not compared" if difference is None else f"differs from the masked path by {difference:.2g} nats at most"
    )
    return Check(
        group="self-test", name="sparse decode", value=f"{PLAN}: {value}",
        health=Health.OK if equal else Health.BROKEN, hint="" if equal else "report it with what this command prints",
    )  # fmt: skip
