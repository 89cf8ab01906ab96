"""Named arrays of a safetensors file as numpy, for readers that must not load torch."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from actsparse.store.files import damaged, missing


def read(path: Path) -> dict[str, Any]:
    """The arrays at `path` by name; raises RunError where the file is absent or damaged."""
    if not path.exists():
        raise missing(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
