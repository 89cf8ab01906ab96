"""What every test shares: one thread, no network, a cache of its own, and tiny models made once."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

REAL_HOME = Path(os.environ.get("ACTSPARSE_HOME") or Path.home() / ".cache" / "actsparse")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which any test may do first


@pytest.fixture(scope="session")
def real_home() -> Path:
    """The cache of the machine, for the tests that need the real SmolLM2."""
    return REAL_HOME


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ACTSPARSE_HOME in a temporary folder."""
    folder = tmp_path_factory.mktemp("home")
    os.environ["ACTSPARSE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a type, saved on first use."""
    import torch
    from tiny import save_tiny

    torch.set_num_threads(1)
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(model_type, root / f"tiny-{model_type}")
        return made[model_type]

    return folder


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder):
    """A tiny model of a type, loaded as the commands load it, once."""
    from actsparse.models.load import load
    from actsparse.specs import ModelSpec

    made = {}

    def loaded(model_type: str):
        if model_type not in made:
            made[model_type] = load(ModelSpec(name=str(tiny_folder(model_type)), device="cpu"))
        return made[model_type]

    return loaded


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 600 words that the tiny tokenizer knows."""
    from tiny import words

    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(words(600, seed=1))
    return path


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts of 20 to 42 words, as JSON lines."""
    import json

    from tiny import words

    path = tmp_path_factory.mktemp("text") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": words(20 + 2 * i, seed=10 + i)}) + "\n" for i in range(12)))
    return path
