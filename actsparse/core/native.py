"""C++ and CUDA of ours: compiled on first use, called through ctypes.

Where it cannot be had (no compiler), callers use torch instead: the same numbers, more slowly.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-ffp-contract=fast")
KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """The compiled `kernels/SOURCE`, built once for this processor and torch version; None without a compiler."""
    from torch.utils.cpp_extension import get_default_build_root

    compiler = shutil.which("c++")
    path = KERNELS / source
    content = path.read_bytes() + " ".join(FLAGS).encode() + _processor().encode()
    name = f"actsparse_{path.stem}_{hashlib.sha256(content).hexdigest()[:12]}"
    built = Path(get_default_build_root()) / f"torch{torch.__version__}" / name / f"{name}.so"
    try:
        if not built.exists():
            if compiler is None:
                return None
            # beside its name and then moved: several processes may build it, and a killed one leaves no lock
            built.parent.mkdir(parents=True, exist_ok=True)
            unfinished = built.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(unfinished), str(path)]
            subprocess.run(command, check=True, capture_output=True)
            os.replace(unfinished, built)
        return ctypes.CDLL(str(built))
    except (subprocess.CalledProcessError, OSError):
        return None


@functools.cache
def gpu_library(source: str, device: torch.device) -> ctypes.CDLL | None:
    """The compiled `kernels/SOURCE` for the GPU `device`; None without nvcc, or where it does not compile."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "bin" / "nvcc").exists() or not cpp_extension.is_ninja_available():
        return None
    path = KERNELS / source
    major, minor = torch.cuda.get_device_capability(device)
    name = f"actsparse_{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}_sm{major}{minor}"
    build = Path(cpp_extension.get_default_build_root()) / f"torch{torch.__version__}" / name
    build.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"]
    try:
        cpp_extension.load(
            name=name,
            sources=[str(path)],
            extra_cuda_cflags=flags,
            build_directory=str(build),
            is_python_module=False,
            with_cuda=True,
        )
        return ctypes.CDLL(str(build / f"{name}.so"))
    except (RuntimeError, OSError):
        return None


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()
