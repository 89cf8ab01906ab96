"""Files that are whole or absent: written beside their name, synced, then moved into place."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from actsparse.errors import RunError

CHUNK = 1 << 20
SHARDS = "shards"
SUMS = "sums"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill `path.tmp`, sync it, and move it onto `path`; raises RunError where the disk refuses.

    What lies at `path` is a file or nothing, else RunError. A link that lies in the place of `path.tmp` is removed, not
    followed. The sum of a shard is noted beside it, so that a resumed run can tell whether it is what was written.
    """
    temporary = path.with_name(path.name + ".tmp")
    if path.exists() and not path.is_file():
        # moving a file onto a device such as /dev/null would take its place
        raise RunError(f"{path} is a directory, a device or a pipe, not a file", "choose another place with --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_symlink():
            temporary.unlink()
        # who may read it is what the umask says, not what a library chooses
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        if path.parent.name == SHARDS:
            _note_sum(path, sha256_of(temporary))
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise disk_error(path, error) from None
    except BaseException:
        _discard(temporary)
        raise


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def _note_sum(shard: Path, sha256: str) -> None:
    """Append a line to the shards' sums, before the shard is moved into place: every line for a name may be the one
    that holds, since a kill may come between. One write, so that lines of several processes do not mix."""
    journal = os.open(shard.with_name(SUMS), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.write(journal, f"{sha256} {shard.name}\n".encode())
        os.fsync(journal)
    finally:
        os.close(journal)


def damaged_shards(folder: Path) -> list[Path]:
    """The shards in `folder` that are no longer what was written there, or lead out of it."""
    known: dict[str, set[str]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            sha256, _, name = line.partition(" ")
            known.setdefault(name, set()).add(sha256)
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_symlink() or (path.is_file() and path.name in known and sha256_of(path) not in known[path.name])
    )


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def plain_bytes(path: Path, most: int | None) -> bytes:
    """The bytes of a file of a run; raises RunError where it is no regular file (a link, a pipe, a device) or, with
    `most`, has more bytes than that. It is looked at before it is opened: a pipe or a device may never end."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise RunError(
                f"{path} is a link, a pipe or a device, and no file that a run wrote",
                "do not use this run, or repeat the command that made it in another --output",
            )
        if most is not None and found.st_size > most:
            raise RunError(f"{path} holds {found.st_size:,} bytes, more than any run writes", "delete it and run again")
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error.strerror}", "check its permissions, or choose another directory"
        ) from None


def missing(path: Path) -> RunError:
    """A file of a run that is not there."""
    return RunError(f"{path} is missing", "repeat the command that made the run with --force")


def damaged(path: Path, error: BaseException) -> RunError:
    """A file of a run that cannot be read."""
    return RunError(f"{path} is damaged: {error}", "repeat the command that made the run with --force")


def disk_error(path: Path, error: OSError) -> RunError:
    """The RunError that says what the disk refused, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no disk space left to write {path}", "free some space, or write elsewhere with --output DIR")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(f"{path} cannot be written: {error.strerror}", "choose a writable place with --output")
    return RunError(f"{path} cannot be written: {error.strerror or error}", "choose another place with --output")
