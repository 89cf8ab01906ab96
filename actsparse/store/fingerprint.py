"""What makes two runs the same: the sha256 of what was asked and of the content it was asked about."""

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

from actsparse.results import SCHEMA_VERSION, RunKind
from actsparse.store.codec import builtins, encode


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
    """Lines `key: old -> new` for every leaf in which two identities differ."""
    before, after = _leaves(builtins(old)), _leaves(builtins(new))
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _leaves(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _leaves(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): str(list(tree) if isinstance(tree, tuple) else tree)}
