"""Commands as children of one warm process (`zygote.py`), since every start of torch costs seconds."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


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
