"""The header of a GGUF file, read with every length checked against the bytes that are there.

The converter trusts these numbers; a file of a hundred bytes could ask it for a petabyte.
Source: the GGUF specification of ggml (version 2 and 3; little endian).
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from actsparse.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_NESTED = 3
MOST_DIMENSIONS = 8
MOST_PARTS = 10_000
VALUES_A_BYTE = 8
LONGEST_TEXT = 2**26
WIDTHS = (".embedding_length", ".feed_forward_length", ".expert_feed_forward_length")
COUNTS = (".block_count", ".attention.head_count", ".attention.head_count_kv", ".expert_count", ".expert_used_count")


@dataclass
class Header:
    """What a GGUF file says of itself: its whole numbers by key, and the shape of each tensor by name."""

    numbers: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """The header of a GGUF file; raises ModelError naming what cannot be true."""
    try:
        with path.open("rb") as handle:
            header = _Reader(handle, path).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    _check_sizes(header, path)
    return header


def _check_sizes(header: Header, path: Path) -> None:
    """Raise ModelError where a file names a width that none of its tensors has, or more parts than any model."""
    widest = max((size for shape in header.shapes.values() for size in shape), default=0)
    for key, values in header.numbers.items():
        if key.endswith(COUNTS) and max(values, default=0) > MOST_PARTS:
            raise _impossible(path, f"{key} is {max(values):,}")
        if key.endswith(WIDTHS) and max(values, default=0) > widest:
            raise _impossible(path, f"{key} is {max(values):,}, and its widest tensor has {widest:,}")
        if key.endswith(".block_count") and max(values, default=0) > len(header.shapes):
            raise _impossible(path, f"{key} is {max(values):,}, and it holds {len(header.shapes):,} tensors")


def _impossible(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is damaged or no GGUF file: {what}", "fetch the file again")


class _Reader:
    """Reads forward through a file and never past its end."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.handle, self.path = handle, path
        self.size = path.stat().st_size

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise _impossible(self.path, "it does not begin with GGUF")
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            raise _impossible(self.path, f"version {version} is not known")
        tensors, keys = self._numbers("QQ")
        found = Header()
        for _ in range(self._fits(keys, 13, "keys")):
            key = self._text()
            values = self._value(0)
            if values is not None:
                found.numbers[key] = values
        for _ in range(self._fits(tensors, 24, "tensors")):
            name = self._text()
            found.shapes[name] = self._shape(name)
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        (dimensions,) = self._numbers("I")
        if dimensions > MOST_DIMENSIONS:
            raise _impossible(self.path, f"the tensor {name} has {dimensions:,} dimensions")
        shape = self._numbers("Q" * dimensions)
        _, offset = self._numbers("IQ")
        values = 1
        for size in shape:
            values *= size
        if values > VALUES_A_BYTE * self.size or offset > self.size:
            raise _impossible(self.path, f"the tensor {name} of shape {list(shape)} does not fit into the file")
        return shape

    def _value(self, depth: int, kind: int | None = None) -> list[int] | None:
        """A value's whole numbers; None where it holds none. The reader stands behind it afterwards."""
        kind = self._numbers("I")[0] if kind is None else kind
        if kind in NUMBERS:
            (number,) = self._numbers(NUMBERS[kind])
            return [number] if isinstance(number, int) else None
        if kind == STRING:
            self._text()
            return None
        if kind != ARRAY or depth >= MOST_NESTED:
            raise _impossible(self.path, f"a value of type {kind} stands {depth} deep")
        return self._array(depth)

    def _array(self, depth: int) -> list[int] | None:
        kind, length = self._numbers("IQ")
        if kind in NUMBERS:
            code = NUMBERS[kind]
            count = self._fits(length, struct.calcsize(f"<{code}"), "numbers")
            numbers = self._numbers(code * count)
            return None if code in "fd" else list(numbers)
        for _ in range(self._fits(length, 8, "entries")):
            self._value(depth + 1, kind)
        return None

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        if length > LONGEST_TEXT:
            raise _impossible(self.path, f"a text of {length:,} bytes")
        return self._bytes(length).decode("utf-8", errors="replace")

    def _fits(self, count: int, size: int, what: str) -> int:
        """`count`, where so many things of at least `size` bytes may follow; raises ModelError otherwise."""
        if count * size > self.size - self.handle.tell():
            raise _impossible(self.path, f"it claims {count:,} {what}, more than its bytes hold")
        return count

    def _numbers(self, codes: str) -> tuple[int, ...]:
        return struct.unpack(f"<{codes}", self._bytes(struct.calcsize(f"<{codes}")))

    def _bytes(self, count: int) -> bytes:
        found = self.handle.read(count) if count <= self.size else b""
        if len(found) != count:
            raise _impossible(self.path, "it ends too early")
        return found
