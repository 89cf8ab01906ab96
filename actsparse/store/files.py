"""Files that are whole or absent: written beside their name, synced, then moved into place."""

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from actsparse.errors import RunError

CHUNK = 1 << 20


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill `path.tmp`, sync it, and move it onto `path`; raises RunError where the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
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


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def disk_error(path: Path, error: OSError) -> RunError:
    """The RunError that says what the disk refused, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no disk space left to write {path}", "free some space, or write elsewhere with --output DIR")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(f"{path} cannot be written: {error.strerror}", "choose a writable place with --output")
    return RunError(f"{path} cannot be written: {error.strerror or error}", "choose another place with --output")
