"""Commands as children of one warm process (`zygote.py`), since every start of torch costs seconds."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Zygote:
    """A warm process that runs commands as its children."""

    process: subprocess.Popen[str]

    def run(self, argv: list[str], cwd: Path, **when: float | None) -> tuple[int, int]:
        """Exit code (negative: the signal) and the number of touched files."""
        assert self.process.stdin
        assert self.process.stdout
        job = {"argv": argv, "cwd": str(cwd), "log": str(cwd.with_suffix(".log")), **when}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["events"]
