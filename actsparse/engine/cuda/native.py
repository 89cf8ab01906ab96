"""The compiled CUDA kernels: built once by torch's extension loader, called through ctypes with plain structures."""

import ctypes
import functools
import hashlib
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from actsparse.errors import ActsparseError

SOURCES = ("rows.cu", "columns.cu", "attention.cu", "token.cu")
HEADERS = ("common.cuh",)
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
HEAD_DIMS = (32, 64, 128)
_FLOAT, _INT, _LONG, _POINTER = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class NativeError(ActsparseError):
    """The compiled kernels cannot be used here; the caller falls back and says so."""


class RowsArgs(ctypes.Structure):
    """Mirrors `RowsArgs` in kernels/rows.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "norm", "bias", "factor", "threshold", "index", "count", "out")),
        *((name, _POINTER) for name in ("best_value", "best_row")),
        ("stride", _LONG),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("second", "rows", "width", "activation", "threshold_step")),
    )


class Segment(ctypes.Structure):
    """Mirrors `Segment` in kernels/columns.cu."""

    _fields_ = (("begin", _INT), ("length", _INT), ("first_tile", _INT))


class ColumnsArgs(ctypes.Structure):
    """Mirrors `ColumnsArgs` in kernels/columns.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "up", "norm", "squares", "score", "threshold", "index")),
        *((name, _POINTER) for name in ("count", "bias", "out", "squares_out")),
        ("stride", _LONG),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("inputs", "outputs", "slices", "segments", "activation", "epilogue")),
        ("squares_count", _INT),
        ("segment", Segment * 3),
    )


class AttendArgs(ctypes.Structure):
    """Mirrors `AttendArgs` in kernels/attention.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cosine", "sine", "keys", "values", "position", "out")),
        ("scale", _FLOAT),
        *((name, _INT) for name in ("heads", "kv_heads", "positions", "splits")),
    )


class TokenArgs(ctypes.Structure):
    """Mirrors `TokenArgs` in kernels/token.cu."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in ("best_value", "best_row", "forced", "tokens", "position", "embedding", "hidden", "squares")
        ),
        ("stride", _LONG),
        ("embed_scale", _FLOAT),
        *((name, _INT) for name in ("candidates", "positions", "width")),
    )


class GatherArgs(ctypes.Structure):
    """Mirrors `GatherArgs` in kernels/token.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("source", "target", "index", "count")),
        ("rows", _LONG),
        *((name, _INT) for name in ("capacity", "parts", "quads")),
    )


class Library:
    """The loaded kernels; every call raises NativeError with CUDA's own words on failure."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        handle.actsparse_error.restype = ctypes.c_char_p

    def _check(self, code: int, kernel: str) -> None:
        if code:
            raise NativeError(f"CUDA kernel {kernel}: {self._handle.actsparse_error(code).decode()}")

    def rows(
        self, args: RowsArgs, dtype: torch.dtype, mode: int, *, blocks: int, threads: int, dependent: bool
    ) -> None:
        call = self._handle.actsparse_rows
        code = call(ctypes.byref(args), DTYPES[dtype], mode, blocks, threads, int(dependent), _stream())
        self._check(code, "rows")

    def columns(self, args: ColumnsArgs, dtype: torch.dtype, selection: int, *, deep: bool, dependent: bool) -> None:
        call = self._handle.actsparse_columns
        code = call(ctypes.byref(args), DTYPES[dtype], selection, int(deep), int(dependent), _stream())
        self._check(code, "columns")

    def attend(self, args: AttendArgs, dtype: torch.dtype, head_dim: int, *, dependent: bool) -> None:
        call = self._handle.actsparse_attend
        self._check(call(ctypes.byref(args), DTYPES[dtype], head_dim, int(dependent), _stream()), "attention")

    def token(self, args: TokenArgs, dtype: torch.dtype, *, dependent: bool) -> None:
        call = self._handle.actsparse_token
        self._check(call(ctypes.byref(args), DTYPES[dtype], int(dependent), _stream()), "token")

    def gather(self, args: GatherArgs, layers: int) -> None:
        self._check(self._handle.actsparse_gather(ctypes.byref(args), layers, _stream()), "gather")


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def address(tensor: Tensor | None) -> int | None:
    """The device address that a structure holds for `tensor`; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> Library:
    """The kernels, compiled on first use (about half a minute) and cached by source, torch version and chip.

    Raises NativeError with the reason where they cannot be had: no GPU, one before Hopper, no compiler.
    """
    if not torch.cuda.is_available():
        raise NativeError("the compiled decode kernels need a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise NativeError(f"the compiled decode kernels need compute capability 9.0 or later, not {major}.{minor}")
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or not (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists():
        raise NativeError("the decode kernels are compiled on first use and no nvcc was found", "install CUDA's nvcc")
    if shutil.which("ninja") is None and not cpp_extension.is_ninja_available():
        raise NativeError("the decode kernels are compiled on first use and ninja was not found", "pip install ninja")
    folder = Path(__file__).parent / "kernels"
    content = b"".join((folder / name).read_bytes() for name in (*SOURCES, *HEADERS))
    name = f"actsparse_decode_{hashlib.sha256(content).hexdigest()[:12]}_sm{major}{minor}"
    build = Path(cpp_extension.get_default_build_root()) / f"torch{torch.__version__}" / name
    build.mkdir(parents=True, exist_ok=True)
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    try:
        cpp_extension.load(
            name=name,
            sources=[str(folder / source) for source in SOURCES],
            extra_cuda_cflags=["-O3", "-std=c++17"],
            build_directory=str(build),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise NativeError(f"the decode kernels did not compile: {str(error)[-2000:]}") from error
    finally:
        if arch is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    return Library(ctypes.CDLL(str(build / f"{name}.so")))
