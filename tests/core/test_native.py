"""Compiling on first use: once, under a name of its own, and never in the way of the next process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actsparse.core import native

NVCC = """#!/bin/sh
echo "$@" >> {folder}/calls
out=; while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -e {folder}/fails ] && exit 1
exec c++ -shared -x c++ /dev/null -o "$out"
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a compiler that makes empty libraries, and notes how it was called."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(NVCC.format(folder=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    native.gpu_library.cache_clear()
    yield tmp_path
    native.gpu_library.cache_clear()


def test_a_gpu_library_is_built_once_for_its_chip(nvcc: Path) -> None:
    for _ in range(2):
        assert native.gpu_library("row_sums.cu", torch.device("cuda:0")) is not None
        native.gpu_library.cache_clear()
    (call,) = (nvcc / "calls").read_text().splitlines()
    assert "-arch=sm_90" in call
    (built,) = (nvcc / "built").rglob("*.so")
    assert [path for path in built.parent.iterdir() if path != built] == []


def test_what_a_killed_compiler_left_is_in_nobodys_way(nvcc: Path) -> None:
    assert native.gpu_library("row_sums.cu", torch.device("cuda:0")) is not None
    (built,) = (nvcc / "built").rglob("*.so")
    built.rename(built.with_suffix(".1.tmp"))
    (built.parent / "lock").touch()
    native.gpu_library.cache_clear()
    assert native.gpu_library("row_sums.cu", torch.device("cuda:0")) is not None


def test_without_a_compiler_or_where_it_fails_there_is_no_library(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nvcc / "fails").touch()
    assert native.gpu_library("row_sums.cu", torch.device("cuda:0")) is None
    native.gpu_library.cache_clear()
    monkeypatch.setattr(native, "cuda_compiler", lambda: None)
    assert native.gpu_library("row_sums.cu", torch.device("cuda:0")) is None


def test_where_nothing_can_be_cached_a_build_is_of_this_process_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    place = native.build_place("some")
    assert place.parent == native._own_root()
    assert place.parent != tmp_path
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cached = native.build_place("some")
    assert cached.is_relative_to(tmp_path / "cache")
    (cached / "some.so").touch()
    monkeypatch.setattr(native.os, "access", lambda *_: False)  # read-only by now
    assert native.build_place("some") == cached
    assert native.build_place("other").parent == native._own_root()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_a_build_of_its_own_is_gone_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    code = 'from actsparse.core import native; print(native.library("row_sums.cpp") is not None, native._own_root())'
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    built, root = done.stdout.split()
    assert built == "True"
    assert not Path(root).exists()
