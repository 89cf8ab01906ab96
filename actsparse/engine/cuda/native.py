"""The compiled CUDA kernels: built once by nvcc, called through ctypes with plain structures."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from actsparse.core.native import cuda_compiler
from actsparse.engine.cuda.structures import (
    AttendArgs,
    BatchColumnsArgs,
    BatchRowsArgs,
    ChooseArgs,
    ColumnsArgs,
    FixArgs,
    GatherArgs,
    MergeArgs,
    NormArgs,
    PostNormArgs,
    RowsArgs,
    ScoresArgs,
    TokenArgs,
    TopArgs,
)
from actsparse.errors import ActsparseError

SOURCES = ("rows.cu", "columns.cu", "batch_rows.cu", "batch_columns.cu", "attention.cu", "choices.cu", "token.cu")
HEADERS = ("common.cuh",)
KERNELS = Path(__file__).parent / "kernels"
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
HEAD_DIMS = (32, 64, 96, 128, 256)


NO_MEMORY = 2  # cudaErrorMemoryAllocation


class NativeError(ActsparseError):
    """The compiled kernels cannot be used here; the caller falls back and says so."""


class Library:
    """The loaded kernels; every call raises NativeError with CUDA's own words on failure, and torch's own error where
    memory does not suffice."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        handle.actsparse_error.restype = ctypes.c_char_p

    def _check(self, code: int, kernel: str) -> None:
        if code:
            said = f"CUDA kernel {kernel}: {self._handle.actsparse_error(code).decode()}"
            raise torch.OutOfMemoryError(said) if code == NO_MEMORY else NativeError(said)

    def rows(
        self, args: RowsArgs, dtype: torch.dtype, mode: int, *, blocks: int, threads: int, deep: bool, dependent: bool
    ) -> None:
        call = self._handle.actsparse_rows
        code = call(ctypes.byref(args), DTYPES[dtype], mode, blocks, threads, int(deep), int(dependent), _stream())
        self._check(code, "rows")

    def columns(
        self, args: ColumnsArgs, dtype: torch.dtype, selection: int, *, groups: int, tiles: int, dependent: bool
    ) -> None:
        call = self._handle.actsparse_columns
        code = call(ctypes.byref(args), DTYPES[dtype], selection, groups, tiles, int(dependent), _stream())
        self._check(code, "columns")

    def batch_rows(
        self,
        args: BatchRowsArgs,
        dtype: torch.dtype,
        mode: int,
        *,
        blocks: int,
        slices: int,
        depth: int,
        dependent: bool,
    ) -> None:
        call = self._handle.actsparse_batch_rows
        code = call(ctypes.byref(args), DTYPES[dtype], mode, blocks, slices, depth, int(dependent), _stream())
        self._check(code, "rows of a batch")

    def batch_columns(
        self, args: BatchColumnsArgs, dtype: torch.dtype, *, room: int, tiles: int, dependent: bool
    ) -> None:
        call = self._handle.actsparse_batch_columns
        code = call(ctypes.byref(args), DTYPES[dtype], room, tiles, int(dependent), _stream())
        self._check(code, "columns of a batch")

    def attend(self, args: AttendArgs, dtype: torch.dtype, head_dim: int, *, dependent: bool) -> None:
        call = self._handle.actsparse_attend
        self._check(call(ctypes.byref(args), DTYPES[dtype], head_dim, int(dependent), _stream()), "attention")

    def token(self, args: TokenArgs, dtype: torch.dtype, *, dependent: bool) -> None:
        call = self._handle.actsparse_token
        self._check(call(ctypes.byref(args), DTYPES[dtype], int(dependent), _stream()), "token")

    def post_norm(self, args: PostNormArgs, *, batch: int, dependent: bool) -> None:
        call = self._handle.actsparse_post_norm
        self._check(call(ctypes.byref(args), batch, int(dependent), _stream()), "post norm")

    def norm(self, args: NormArgs, *, batch: int, dependent: bool) -> None:
        self._check(self._handle.actsparse_norm(ctypes.byref(args), batch, int(dependent), _stream()), "norm")

    def fix(self, args: FixArgs, *, dependent: bool) -> None:
        self._check(self._handle.actsparse_fix(ctypes.byref(args), int(dependent), _stream()), "fix")

    def top(self, args: TopArgs, *, dependent: bool) -> None:
        self._check(self._handle.actsparse_top(ctypes.byref(args), int(dependent), _stream()), "top")

    def scores(self, args: ScoresArgs, *, blocks: int, whole: bool, dependent: bool) -> None:
        call = self._handle.actsparse_scores
        self._check(call(ctypes.byref(args), blocks, int(whole), int(dependent), _stream()), "scores")

    def choose(self, args: ChooseArgs, *, dependent: bool) -> None:
        self._check(self._handle.actsparse_choose(ctypes.byref(args), int(dependent), _stream()), "choose")

    def merge(self, args: MergeArgs, *, dependent: bool) -> None:
        self._check(self._handle.actsparse_merge(ctypes.byref(args), int(dependent), _stream()), "merge")

    def gather(self, args: GatherArgs, layers: int) -> None:
        self._check(self._handle.actsparse_gather(ctypes.byref(args), layers, _stream()), "gather")


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def address(tensor: Tensor | None) -> int | None:
    """The device address that a structure holds for `tensor`; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> Library:
    """The kernels, compiled on first use (about half a minute) and cached by source and chip.

    Raises NativeError with the reason where they cannot be had: no GPU, one before Hopper, no compiler.
    """
    if not torch.cuda.is_available():
        raise NativeError("the compiled decode kernels need a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise NativeError(f"the compiled decode kernels need compute capability 9.0 or later, not {major}.{minor}")
    path = library_path(f"sm_{major}{minor}")
    if not path.exists():
        build(path, f"sm_{major}{minor}")
    return Library(ctypes.CDLL(str(path)))


def library_path(arch: str) -> Path:
    """Where the kernels of these sources for `arch` ("sm_90") lie once they are built."""
    content = b"".join((KERNELS / name).read_bytes() for name in (*SOURCES, *HEADERS))
    digest = hashlib.sha256(content).hexdigest()[:16]
    home = Path(os.environ.get("ACTSPARSE_HOME") or Path.home() / ".cache" / "actsparse")
    return home / "kernels" / f"decode_{arch}_{digest}.so"


def build(path: Path, arch: str) -> None:
    """Compiles the kernels to `path`, all sources at once; raises NativeError with the compiler's words."""
    compiler = _compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source}.o" for source in SOURCES]
        flags = ["-O3", "-std=c++17", f"-arch={arch}", "-Xcompiler", "-fPIC"]
        running = [
            _start([compiler, *flags, "-c", str(KERNELS / source), "-o", str(made)])
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        for process in running:
            _finish(process)
        linked = Path(folder) / path.name
        _finish(_start([compiler, "-shared", f"-arch={arch}", "-o", str(linked), *map(str, objects)]))
        linked.replace(path)


def _compiler() -> str:
    found = cuda_compiler()
    if found is None:
        raise NativeError(
            "the decode kernels are compiled on first use, and no nvcc was found",
            "install CUDA's compiler, or set CUDA_HOME to where it is",
        )
    return found


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate()
    if process.returncode:
        raise NativeError(f"the decode kernels did not compile: {said[-2000:]}")
