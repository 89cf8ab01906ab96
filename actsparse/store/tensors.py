"""Named tensors as safetensors files, whole or absent."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actsparse.errors import RunError
from actsparse.store.files import write_atomic


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, contiguous and on the CPU."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(plain, str(temporary), metadata))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors at `path`; raises RunError where the file is absent or damaged."""
    if not path.exists():
        raise RunError(f"{path} is missing", "repeat the command that made the run with --force")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}", "repeat the command that made the run with --force") from None
