"""The twins: two small language models that differ in their activation and in nothing else."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from actsparse.errors import ActsparseError

_HERE = Path(__file__).parent


def directory(name: Literal["silu", "relu"]) -> Path:
    """The folder of one twin, for `from_pretrained`.

    Raises `ActsparseError` if a weight or tokenizer file is missing or not the one that was
    shipped.
    """
    expected: dict[str, str] = json.loads((_HERE / "checksums.json").read_text())
    for path, digest in expected.items():
        if path.startswith(f"{name}/"):
            _verify(_HERE / path, digest)
    return _HERE / name


def _verify(path: Path, digest: str) -> None:
    if not path.is_file():
        problem = "is missing"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        problem = "is damaged: its checksum is not the one that was shipped"
    else:
        return
    raise ActsparseError(
        what=f"The model file {path} {problem}.",
        hint="Install actsparse again: pip install --force-reinstall --no-deps actsparse",
        exit_code=1,
    )
