"""Commands as children of one warm process (`zygote.py`), since every start of torch costs seconds."""

import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLOCKS = ("started", "finished", "seconds")
MADE = re.compile(r"<dt>made</dt><dd>[^<]*</dd>|\d{4}-\d\d-\d\d \d\d:\d\d UTC")


@dataclass
class Zygote:
    """A warm process that runs commands as its children."""

    process: subprocess.Popen[str]

    def run(self, argv: list[str], cwd: Path, **when: float | None) -> tuple[int, int]:
        """Exit code (negative: the signal) and the number of touched files; what is said goes to `cwd`.log."""
        assert self.process.stdin
        assert self.process.stdout
        job = {"argv": argv, "cwd": str(cwd), "log": str(cwd.with_suffix(".log")), **when}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["events"]


@contextmanager
def little_memory(spare: int) -> Iterator[None]:
    """So many bytes more than this process holds are all that it can take while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def written(folder: Path) -> dict[str, object]:
    """Everything that a command wrote, by name, but for what tells when it did."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        name = str(path.relative_to(folder))
        if path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            provenance = {key: value for key, value in manifest["provenance"].items() if key not in CLOCKS}
            found[name] = manifest | {"provenance": provenance}
        elif path.suffix == ".html":
            page, made = MADE.subn("", path.read_text())
            assert made, f"{name} does not say when its runs were made"
            found[name] = page
        else:
            found[name] = path.read_bytes()
    return found


def different(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of what is not the same in both."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
