"""Named tensors as safetensors files, whole or absent."""

import errno
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actsparse.store.files import damaged, missing, write_atomic


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, contiguous and on the CPU."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(plain, str(temporary), metadata)
        except SafetensorError as error:
            raise system_error(error) from None

    write_atomic(path, save)


def system_error(error: OSError | SafetensorError) -> OSError:
    """The system's error, which the safetensors library wraps: a full disk is to be reported as one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    code = re.search(r"code: (\d+)|os error (\d+)", str(error))
    return OSError(int(next(filter(None, code.groups()))) if code else errno.EIO, str(error))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors at `path`; raises RunError where the file is absent or damaged."""
    if not path.exists():
        raise missing(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
