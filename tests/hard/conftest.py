"""A warm process that runs commands, for the tests that kill them or take something away from them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Zygote

import actsparse


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with warm(hash_seed="0") as process:
        yield process


@pytest.fixture(scope="session")
def other_zygote() -> Iterator[Zygote]:
    """Another process, in which sets of texts have another order."""
    with warm(hash_seed="1") as process:
        yield process


# a pool of one thread a core cannot start where little memory is left
FEW_THREADS = {"RAYON_NUM_THREADS": "2", "POLARS_MAX_THREADS": "2"}


@contextmanager
def warm(hash_seed: str) -> Iterator[Zygote]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _checkout(),
                          "PYTHONHASHSEED": hash_seed, **FEW_THREADS},
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield Zygote(process)
    assert process.stdin
    process.stdin.close()
    process.wait(timeout=60)


def _checkout() -> str:
    """Where the package under test lies, whatever is installed."""
    return str(Path(actsparse.__file__).parents[1])
