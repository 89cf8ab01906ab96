"""Tests of the CUDA decode engine: those marked `gpu` need a device, the others run anywhere."""

import os
import subprocess
import sys

import pytest
import torch

if torch.cuda.is_available():
    from actsparse.engine.cuda.availability import native_failure

    native_failure()  # builds the kernels in the machine's cache, before tests get one of their own

ALONE = "ACTSPARSE_TEST_ALONE"


def pytest_pyfunc_call(pyfuncitem):
    """A test marked `alone` runs in a process of its own, which holds nothing of the device yet."""
    if pyfuncitem.get_closest_marker("alone") is None or ALONE in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
               f"{pyfuncitem.path}::{pyfuncitem.name}"]  # fmt: skip
    # no worker of xdist: its variables would make the other process one
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=known | {ALONE: "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.fixture
def operators(device):
    from actsparse.engine.cuda.operators import Operators

    return Operators(device)


@pytest.fixture
def draw():
    """Fresh normal values: `draw(rows, columns, dtype=...)`; the seed is the session's, so every call differs."""

    def make(*size, dtype=torch.float32, scale=1.0, device="cuda"):
        return (torch.randn(size, device=device) * scale).to(dtype)

    return make


@pytest.fixture
def poisoned():
    """A float32 output full of NaN, so that an element never written cannot pass."""

    def make(*size, device="cuda"):
        return torch.full(size, torch.nan, device=device)

    return make


@pytest.fixture
def assert_near():
    """||got - want|| <= limit * ||want||, and every element finite."""

    def check(got, want, limit=2e-3):
        got, want = got.double(), want.double()
        assert torch.isfinite(got).all(), f"{(~torch.isfinite(got)).sum().item()} elements are not finite"
        error = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
        assert error <= limit, f"relative error {error:.2e}, limit {limit:.0e}"

    return check
