"""How much memory may be taken, against made-up systems and a real limit on a real process."""

import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.models.room import room

GB = 2**30
MACHINE = {"proc/meminfo": f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {16 * GB // 1024} kB\nSwapFree: 0 kB\n"}


def system(root: Path, files: dict[str, object]) -> Path:
    for name, text in (MACHINE | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def v1(path: str, limit: object, used: int, cache: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"active_file 7\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\n",
    }


def v2(path: str, limit: object, used: int, cache: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 3\ninactive_file {cache // 2}\nactive_file {cache // 2}\n",
    }


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
SWAP = {"proc/meminfo": f"MemAvailable: {16 * GB // 1024} kB\nSwapFree: {3 * GB // 1024} kB\n"}
IN_V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n"}
IN_V2 = {"proc/self/cgroup": "0::/a/b\n"}
SYSTEMS = {
    "no group": ({}, 16),
    "swap": ({"proc/meminfo": f"MemAvailable: {GB // 1024} kB\nSwapFree: {2 * GB // 1024} kB\n"}, 3),
    "v1": (IN_V1 | v1("/a/b", 8 * GB, 5 * GB, 2 * GB), 5),
    "v1 without limit": (IN_V1 | v1("/a/b", 9223372036854771712, 5 * GB, 2 * GB), 16),
    "v1 above": (IN_V1 | v1("/a/b", 8 * GB, GB, 0) | v1("/a", 6 * GB, 4 * GB, 0), 2),
    "v1 as a container sees it": (IN_V1 | v1("", 4 * GB, GB, 0), 3),
    "v2": (IN_V2 | v2("/a/b", 8 * GB, 5 * GB, 2 * GB), 5),
    "v2 without limit": (IN_V2 | v2("/a/b", "max", 5 * GB, 2 * GB), 16),
    "v2 above": (IN_V2 | v2("/a/b", "max", GB, 0) | v2("/a", 6 * GB, 4 * GB, 0), 2),
    "v2 as a container sees it": ({"proc/self/cgroup": "0::/../../x\n"} | v2("", 4 * GB, GB, 0), 3),
    "v1 with swap": (IN_V1 | SWAP | v1("/a/b", 8 * GB, 5 * GB, 2 * GB), 8),
    "v1 with swap bounded": (
        IN_V1 | SWAP | v1("/a/b", 8 * GB, 5 * GB, 2 * GB)
        | {f"{V1}/a/b/memory.memsw.limit_in_bytes": 9 * GB, f"{V1}/a/b/memory.memsw.usage_in_bytes": 5 * GB},
        6,
    ),
    "v2 with swap": (IN_V2 | SWAP | v2("/a/b", 8 * GB, 5 * GB, 2 * GB) | {f"{V2}/a/b/memory.swap.max": "max"}, 8),
    "v2 with swap bounded": (
        IN_V2 | SWAP | v2("/a/b", 8 * GB, 5 * GB, 2 * GB)
        | {f"{V2}/a/b/memory.swap.max": 2 * GB, f"{V2}/a/b/memory.swap.current": GB},
        6,
    ),
    "v2 with no swap allowed": (
        IN_V2 | SWAP | v2("/a/b", 8 * GB, 5 * GB, 2 * GB)
        | {f"{V2}/a/b/memory.swap.max": 0, f"{V2}/a/b/memory.swap.current": 0},
        5,
    ),
    "v2 with kernel caches": (
        IN_V2 | v2("/a/b", 8 * GB, 5 * GB, 0)
        | {f"{V2}/a/b/memory.stat": f"inactive_file {GB}\nslab_reclaimable {GB}\nslab_unreclaimable {GB}\n"},
        5,
    ),
    "more held than allowed": (IN_V2 | v2("/a", GB, 2 * GB, 0), 0),
    "nothing but noise": ({"proc/self/cgroup": "\n:\nx\n0:\n::\n"} | v2("", "", 0, 0), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_least_of_machine_and_groups_is_left(name: str, tmp_path: Path) -> None:
    files, expected = SYSTEMS[name]
    found = room(system(tmp_path, files))
    assert found is not None
    assert found.bytes == expected * GB
    assert found.where == ("this machine" if name in ("swap", "nothing but noise") or expected == 16 else
                           "this control group (cgroup)")  # fmt: skip


def test_a_system_that_says_nothing_sets_no_bound(tmp_path: Path) -> None:
    assert room(tmp_path) is None


def test_this_system_says_something() -> None:
    found = room()
    assert found is not None
    assert found.bytes > 0


def test_the_address_space_that_a_shell_leaves_is_what_can_be_taken() -> None:
    asked = (
        "from actsparse.models.room import room\n"
        "free = room()\n"
        "assert free.bytes > 2**26, free\n"
        "whole = bytearray(int(free.bytes * 0.9))\n"
        "print(free.where)\n"
        "try: bytearray(int(free.bytes * 0.2))\n"
        "except MemoryError: print('no more')\n"
    )
    kib = 2**20
    shell = f'ulimit -v {kib}; exec {sys.executable} -c "$0"'
    done = subprocess.run(["sh", "-c", shell, asked], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["this process (ulimit -v)", "no more"], done.stderr
