"""Starts commands as children of one warm process, and kills them for good where it is told to.

Reads one JSON object a line: `argv`, `cwd`, and when to die: `event` (before the n-th touch of a file below `cwd`) or
`seconds`; `memory` bounds the bytes that it can take. Answers with `code` (negative: the signal) and how many `events`
there were.
"""

import json
import mmap
import os
import signal
import struct
import sys
import time
from contextlib import nullcontext

import torch
import transformers  # noqa: F401
from processes import little_memory

import actsparse.pipelines.run
import actsparse.report.build  # noqa: F401
from actsparse.cli.app import main
from actsparse.pipelines import recording

TOUCHES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
COUNT = mmap.mmap(-1, 8)


def child(job: dict) -> None:
    """Run the command, counting what it touches, and end this process."""
    os.chdir(job["cwd"])
    root, die_at = os.path.realpath(job["cwd"]), job.get("event")
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def count(name: str, details: tuple) -> None:
        if name not in TOUCHES or not isinstance(details[0], str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(details[0])).startswith(root):
            return
        (seen,) = struct.unpack("q", COUNT[:8])
        COUNT[:8] = struct.pack("q", seen + 1)
        if seen == die_at:
            os.kill(os.getpid(), job.get("signal", signal.SIGKILL))

    sys.argv = ["actsparse", *job["argv"]]
    sys.addaudithook(count)
    with little_memory(job["memory"]) if "memory" in job else nullcontext():
        code = main(job["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float | None) -> int:
    """The exit status of a child, killed after so many seconds."""
    stop = None if seconds is None else time.monotonic() + seconds
    while stop is not None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > stop:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    recording.CHECKPOINT_SECONDS = -1.0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        job = json.loads(line)
        COUNT[:8] = struct.pack("q", 0)
        pid = os.fork()
        if pid == 0:
            child(job)
        code = os.waitstatus_to_exitcode(wait(pid, job.get("seconds")))
        sys.stdout.write(json.dumps({"code": code, "events": struct.unpack("q", COUNT[:8])[0]}) + "\n")
        sys.stdout.flush()
