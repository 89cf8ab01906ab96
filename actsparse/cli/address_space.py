"""`ulimit -v`: what a command's libraries take of it, looked at before they are imported.

Libraries map their code and reserve room for the memory of their threads. Where that fails, those written in Rust end
the process, and no part of Python can say why. Measured on Linux x86-64 with the CPU build of torch.
"""

import os
import sys
from dataclasses import dataclass

from actsparse.cli.output import Output
from actsparse.errors import ActsparseError
from actsparse.models.room import address_space

FEW_THREADS = {"POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1"}
HINT = "raise it (ulimit -v unlimited), and limit memory itself by a control group: systemd-run --scope -p MemoryMax=4G"


@dataclass(frozen=True)
class _Need:
    """Bytes of addresses: below `least` nothing can be imported, below `usual` a library may end the process."""

    least: float
    usual: float


TABLES, MODELS = _Need(0.5e9, 1.1e9), _Need(1.5e9, 2.4e9)
NEEDS = {"report": TABLES} | dict.fromkeys(("profile", "threshold", "evaluate", "run", "doctor"), MODELS)


def check_address_space(command: str, output: Output) -> None:
    """Raise ActsparseError where `ulimit -v` leaves too little for what a command imports; warn where it may not do.

    Under a limit, libraries that are not imported yet start one thread each, since threads reserve addresses.
    """
    need, left = NEEDS.get(command), address_space()
    if need is None or left is None or "polars" in sys.modules:
        return
    for name, count in FEW_THREADS.items():
        os.environ.setdefault(name, count)
    said = f"ulimit -v leaves {left / 1e9:.1f} GB of addresses, and the libraries of `actsparse {command}`"
    if left < need.least:
        raise ActsparseError(f"{said} take {need.usual / 1e9:.1f} GB", HINT)
    if left < need.usual:
        output.warn(f"{said} take up to {need.usual / 1e9:.1f} GB: they may end the process without a word")
