"""Who made a run: versions, machine, command, times."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from actsparse import __version__
from actsparse.results import Provenance

PACKAGES = ("torch", "transformers", "polars", "safetensors", "datasets", "gguf")


def now() -> str:
    """The current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def gather(*, device: str, threads: int) -> Provenance:
    """The provenance of a run that starts now."""
    return Provenance(
        actsparse=__version__,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        platform=platform.platform(),
        processor=processor(),
        device=device,
        threads=threads,
        git_commit=_git_commit(),
        command=("actsparse", *sys.argv[1:]),
        started=now(),
    )


def again(command: Sequence[str]) -> str:
    """The command line that goes on with an interrupted one: without the flags that would start it over."""
    return shlex.join(word for word in command if word not in ("--force", "--no-resume"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x {os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"


@cache
def _git_commit() -> str | None:
    """The commit of the checkout that actsparse itself runs from; None for a wheel, and where git does not say."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a machine so busy that it does not answer: no reason to end a run
    return done.stdout.strip() or None
