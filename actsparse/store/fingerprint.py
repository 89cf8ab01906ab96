"""What makes two runs the same: the sha256 of what was asked and of the content it was asked about."""

import hashlib
import re
from dataclasses import fields, is_dataclass
from typing import Any

from actsparse.results import SCHEMA_VERSION, RunKind
from actsparse.store.codec import builtins, encode

_HASH = re.compile(r"[0-9a-f]{40,64}")


def asked(spec: Any) -> dict[str, Any]:
    """The fields of a spec that say what was asked, without those that only say how to run it."""
    return {
        field.name: asked(value) if is_dataclass(value) else builtins(value)
        for field in fields(spec)
        if not field.metadata.get("runtime")
        for value in [getattr(spec, field.name)]
    }


def fingerprint(kind: RunKind, identity: dict[str, Any]) -> str:
    """The hex sha256 of a run's identity under this schema version."""
    return hashlib.sha256(encode({"schema": SCHEMA_VERSION, "kind": kind, "identity": identity})).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every leaf in which two identities differ; of hashes their first digits."""
    before, after = _leaves(builtins(old)), _leaves(builtins(new))
    return [
        f"{key.removeprefix('asked.').removeprefix('data.')}: {_told(before.get(key))} -> {_told(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _told(value: str | None) -> str:
    return "(absent)" if value is None else _HASH.sub(lambda found: f"{found.group()[:8]}...", value)


def _leaves(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _leaves(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): str(list(tree) if isinstance(tree, tuple) else tree)}
