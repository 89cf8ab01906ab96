"""The compiled operators: built once by torch's extension loader, cached by source, torch version and CPU flags."""

import ctypes
import functools
import hashlib
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from actsparse.core.native import build_place
from actsparse.errors import ActsparseError

KERNELS = Path(__file__).parent / "kernels"
SOURCE, HEADER = KERNELS / "decode.cpp", KERNELS / "vectors.h"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-Wno-attributes")


class BuildError(ActsparseError):
    """The operators cannot be compiled here; the caller takes torch instead and says so."""


def _silent(_text: str) -> None:
    """Say nothing."""


def library(note: Callable[[str], None] = _silent) -> ctypes.CDLL:
    """The operators, compiled where this machine has not done so yet; `note` is told before a build of half a minute.

    Raises BuildError with the reason where there is no compiler, or it fails.
    """
    found = _loaded()
    if isinstance(found, ctypes.CDLL):
        return found
    return _build(note)


def failure(note: Callable[[str], None] = _silent) -> str | None:
    """Why the operators cannot be had on this machine, or None if they can (they are built then)."""
    try:
        library(note)
    except BuildError as error:
        return error.what
    return None


@functools.cache
def cpu_flags() -> str:
    """What this processor can do: code built for another may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.machine() + " ".join(sorted(flags.partition(":")[2].split()))


@functools.cache
def _place() -> Path:
    digest = hashlib.sha256()
    for part in (SOURCE.read_bytes(), HEADER.read_bytes(), cpu_flags().encode(), " ".join(FLAGS).encode()):
        digest.update(part)
    return build_place(f"actsparse_cpu_{digest.hexdigest()[:16]}")


_memory: dict[str, ctypes.CDLL | BuildError] = {}


def _loaded() -> ctypes.CDLL | None:
    """What this process has loaded or an earlier one has built; an earlier failure of this process is raised again."""
    known = _memory.get("library")
    if isinstance(known, BuildError):
        raise known
    if known is None and (built := _place() / f"{_place().name}.so").exists():
        try:
            known = _memory["library"] = _typed(ctypes.CDLL(str(built)))
        except OSError:  # a build that was cut off: made again
            return None
    return known


def _build(note: Callable[[str], None]) -> ctypes.CDLL:
    try:
        found = _memory["library"] = _compile(note)
    except BuildError as error:
        _memory["library"] = error
        raise
    return found


def _compile(note: Callable[[str], None]) -> ctypes.CDLL:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise BuildError(f"the CPU operators are compiled on first use and no compiler ({compiler}) was found")
    if not cpp_extension.is_ninja_available():
        raise BuildError("the CPU operators are compiled on first use and ninja was not found", "pip install ninja")
    place = _place()
    note("compiling the CPU operators, once on this machine (about half a minute)")
    try:
        place.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(
            name=place.name,
            sources=[str(SOURCE)],
            extra_cflags=list(FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=str(place),
            is_python_module=False,
        )
        return _typed(ctypes.CDLL(str(place / f"{place.name}.so")))
    except (RuntimeError, OSError) as error:
        raise BuildError(f"the CPU operators did not compile: {str(error)[-2000:]}") from error


def _typed(handle: ctypes.CDLL) -> ctypes.CDLL:
    handle.actsparse_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    handle.actsparse_run.restype = None
    handle.actsparse_read.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    handle.actsparse_read.restype = ctypes.c_double
    handle.actsparse_max_batch.restype = ctypes.c_int
    return handle
