"""C++ and CUDA of ours: compiled on first use, called through ctypes.

Where it cannot be had (no compiler), callers use torch instead: the same numbers, more slowly.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-ffp-contract=fast")
KERNELS = Path(__file__).parent / "kernels"
CUDA_FLAGS = ("-O3", "-std=c++20")
# Fewer operations than this are not worth another thread.
WORK_PER_THREAD = 1 << 16
T = TypeVar("T")


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """The compiled `kernels/SOURCE`, built once for this processor and torch version; None without a compiler."""
    compiler = shutil.which("c++")
    return None if compiler is None else _built(source, [compiler, *FLAGS, "-shared", "-fPIC"], _processor())


@functools.cache
def gpu_library(source: str, device: torch.device) -> ctypes.CDLL | None:
    """The compiled `kernels/SOURCE` for the GPU `device`; None without nvcc, or where it does not compile."""
    compiler = cuda_compiler()
    if compiler is None:
        return None
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return _built(source, [compiler, *CUDA_FLAGS, f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"], arch)


def cuda_compiler() -> str | None:
    """nvcc: of CUDA_HOME or CUDA_PATH, where it is usually installed, or on the path."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for home in (*homes, "/usr/local/cuda"):
        candidate = Path(home) / "bin" / "nvcc"
        if candidate.exists():
            return str(candidate)
    return shutil.which("nvcc")


def build_place(name: str) -> Path:
    """The folder in which the build of that name is, or is to be made.

    In the cache of compiled kernels: TORCH_EXTENSIONS_DIR, else where torch keeps its extensions. Where nothing can be
    written there, in a folder of this process alone, which goes with it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    place = root / f"torch{torch.__version__}" / name
    if (place / f"{name}.so").exists():
        return place
    try:
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except OSError:
        pass
    own = _own_root()
    return place if own is None else own / name


@functools.cache
def _own_root() -> Path | None:
    """A folder that is removed when the process ends; None where there is no place for one."""
    try:
        root = tempfile.mkdtemp(prefix="actsparse-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root)


def _built(source: str, command: list[str], target: str) -> ctypes.CDLL | None:
    """What `command` makes of a source for a `target`, once for every version of either and of torch."""
    path = KERNELS / source
    content = path.read_bytes() + " ".join(command[1:]).encode() + target.encode()
    name = f"actsparse_{path.stem}_{hashlib.sha256(content).hexdigest()[:12]}"
    built = build_place(name) / f"{name}.so"
    try:
        if not built.exists():
            # beside its name and then moved: several processes may build it, and a killed one leaves no lock
            built.parent.mkdir(parents=True, exist_ok=True)
            unfinished = built.with_suffix(f".{os.getpid()}.tmp")
            subprocess.run([*command, "-o", str(unfinished), str(path)], check=True, capture_output=True)
            os.replace(unfinished, built)
        return ctypes.CDLL(str(built))
    except (subprocess.CalledProcessError, OSError):
        return None


def in_parts(count: int, work: int, part: Callable[[slice], T]) -> list[T]:
    """`part` of consecutive spans of 0 .. count-1, one a thread of torch's, in their order.

    `work`: about how many operations one place takes; small tasks get fewer threads.
    """
    wanted = max(1, min(torch.get_num_threads(), count * work // WORK_PER_THREAD, count))
    bounds = [count * place // wanted for place in range(wanted + 1)]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [part(spans[0])] if wanted == 1 else list(_pool(torch.get_num_threads()).map(part, spans))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="actsparse")


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()
