"""How much memory this process may still take: what the machine has free, or less where a limit is set on it.

Containers and batch systems limit the control group that a process is in, shells (`ulimit -v`) its address space. Of a
group the limit less what it holds is left, without the caches of files and of the kernel, which give way, and the swap
that it may use. Formats: proc(5), cgroups(7), and
the kernel's cgroup-v1/memory and cgroup-v2 documents.
"""

import os
import posixpath
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken, and whose they are, in words that end "free in ..."."""

    bytes: int
    where: str


@dataclass(frozen=True)
class _Controller:
    """The files of one version of control groups."""

    mount: str
    limit: str
    used: str
    swap_limit: str
    swap_used: str
    swap_with_memory: bool
    caches: tuple[str, ...]


# version 1 counts a group and those below it under `total_`; version 2 has no other way to count
_V1 = _Controller(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.memsw.limit_in_bytes",
    "memory.memsw.usage_in_bytes", True, ("total_inactive_file", "total_active_file"),
)  # fmt: skip
_V2 = _Controller(
    "sys/fs/cgroup", "memory.max", "memory.current", "memory.swap.max", "memory.swap.current", False,
    ("inactive_file", "active_file", "slab_reclaimable"),
)  # fmt: skip


def room(root: Path = Path("/")) -> Room | None:
    """The least of what the machine, the control groups and `ulimit -v` leave; None where the system does not say.

    `root`: where /proc and /sys are found.
    """
    bounds = [*_machine(root), *_groups(root), *_address_space(root)]
    return min(bounds, key=lambda bound: bound.bytes, default=None)


def _machine(root: Path) -> Iterator[Room]:
    """Memory and swap that are free or can be made free."""
    found = _table(root / "proc/meminfo")
    if "MemAvailable" in found:
        yield Room((found["MemAvailable"] + found.get("SwapFree", 0)) * 1024, "this machine")
    elif "SC_PHYS_PAGES" in os.sysconf_names and root == Path("/"):
        yield Room(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine")


def _groups(root: Path) -> Iterator[Room]:
    """What every group that holds this process leaves, from its own up to the mount."""
    free_swap = _table(root / "proc/meminfo").get("SwapFree", 0) * 1024
    for controller, own in _memberships(root):
        mount = root / controller.mount
        for group in (own, *own.parents):
            # a container may see the path that its host sees, which is not there: what is mounted is then its own
            folder = mount / group.relative_to("/")
            counted = _table(folder / "memory.stat")
            cache = sum(counted.get(name, 0) for name in controller.caches)
            left = _left(folder / controller.limit, folder / controller.used, cache)
            if left is None:
                continue
            if controller.swap_with_memory:
                both = _left(folder / controller.swap_limit, folder / controller.swap_used, cache)
                swap = None if both is None else max(0, both - left)
            else:
                swap = _left(folder / controller.swap_limit, folder / controller.swap_used)
            swap = free_swap if swap is None else min(swap, free_swap)
            yield Room(left + swap, "this control group (cgroup)")


def _left(limit: Path, used: Path, cache: int = 0) -> int | None:
    """What a limit leaves beside what is used and does not give way; None where there is no limit."""
    most, held = _number(limit), _number(used)
    return None if most is None or held is None else max(0, most - max(0, held - cache))


def _memberships(root: Path) -> Iterator[tuple[_Controller, PurePosixPath]]:
    """The groups of this process that can limit memory, of both versions: `4:memory:/a/b` and `0::/a/b`."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own = PurePosixPath(posixpath.normpath(posixpath.join("/", path)))
        if "memory" in controllers.split(","):
            yield _V1, own
        elif number == "0" and not controllers:
            yield _V2, own


def address_space(root: Path = Path("/")) -> int | None:
    """What `ulimit -v` leaves of addresses, which files that are mapped take as well; None without a limit."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _lines(root / "proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE"))


def _address_space(root: Path) -> Iterator[Room]:
    left = address_space(root)
    if left is not None:
        yield Room(left, "this process (ulimit -v)")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number that a file holds; None where it is not there, or `max`."""
    said = _lines(path)
    return int(said[0]) if said and said[0].strip().isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """A file of names and whole numbers, such as `MemFree:  12 kB` or `active_file 12`."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {one[0]: int(one[1]) for one in words if len(one) > 1 and one[1].isdecimal()}
