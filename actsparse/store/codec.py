"""The one place that turns records into JSON and back.

`encode` is canonical (sorted keys, no spaces), so that equal records have equal bytes; `decode` checks every field
against the record's types and reports the path of the first one that does not fit.
"""

from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from actsparse.errors import RunError

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 1024 * 1024


def _to_builtin(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def builtins(record: Any) -> Any:
    """The record as dicts, lists, numbers and strings."""
    return msgspec.to_builtins(record, enc_hook=_to_builtin)


def encode(record: Any) -> bytes:
    """Canonical JSON: sorted keys, one line, UTF-8. Raises ValueError on NaN and infinity, which JSON cannot hold."""
    plain = builtins(record)
    _check_finite(plain)
    return msgspec.json.encode(plain, order="sorted")


def _check_finite(tree: Any) -> None:
    if isinstance(tree, float) and not isfinite(tree):
        raise ValueError(f"JSON cannot hold {tree}")
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        _check_finite(part)


def pretty(record: Any) -> str:
    """Indented JSON in the order of the record's fields, for people; NaN and infinity become null."""
    return msgspec.json.format(msgspec.json.encode(builtins(record)), indent=2).decode()


def decode(data: bytes, kind: type[T], where: str) -> T:
    """The record of type `kind` in `data`; raises RunError naming `where` and the field that does not fit."""
    if len(data) > MAX_JSON_BYTES:
        raise RunError(
            f"{where} holds {len(data):,} bytes of JSON, more than any run writes", "delete it and run again"
        )
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RunError(
            f"{where} is not a valid {getattr(kind, '__name__', kind)}: {error}",
            "it was damaged or written by another version; repeat the command that made it with --force",
        ) from None
