"""`ACTSPARSE_HOME`: where converted models and hashes of large files are kept."""

import hashlib
import os
from pathlib import Path

import msgspec

from actsparse.errors import ModelError

CHUNK = 1 << 22


def home() -> Path:
    """The cache directory: `$ACTSPARSE_HOME`, else `~/.cache/actsparse`; made when missing.

    Raises ModelError where it cannot be written.
    """
    path = Path(os.environ.get("ACTSPARSE_HOME") or Path.home() / ".cache" / "actsparse")
    make_folder(path)
    return path


def make_folder(path: Path) -> None:
    """Make a folder of the cache; raises ModelError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the cache directory {path} cannot be made: {error.strerror}",
            "set ACTSPARSE_HOME to a writable directory",
        ) from None


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file, remembered by path, inode, size and times."""
    stat = path.stat()
    # a clock that jumps back, or a copied time, may repeat the one of modification; that of the last change is not set
    key = f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    try:
        memory = home() / "hashes.json"
        known: dict[str, str] = msgspec.json.decode(memory.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError, ModelError):
        memory, known = None if not _writable_home() else home() / "hashes.json", {}
    if key not in known:
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while chunk := handle.read(CHUNK):
                digest.update(chunk)
        known[key] = digest.hexdigest()
        if memory is not None:
            _remember(memory, known)
    return known[key]


def _writable_home() -> bool:
    try:
        return os.access(home(), os.W_OK)
    except ModelError:
        return False


def _remember(memory: Path, known: dict[str, str]) -> None:
    temporary = memory.with_name(f"{memory.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(known))
        os.replace(temporary, memory)
    except OSError:
        temporary.unlink(missing_ok=True)
