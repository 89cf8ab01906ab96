"""A row of the family table as a TOML file: a family that the table lacks, without touching the package."""

import hashlib
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from actsparse.errors import ModelError
from actsparse.models.families import FAMILIES, Family

LARGEST = 64 * 1024
OPTIONAL = frozenset({"gate", "experts", "shared"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFile:
    """A row that was read from a file, and the hash of what it says (comments and order do not count)."""

    path: Path
    row: Family
    sha256: str


def read_family(path: Path) -> FamilyFile:
    """The row in a TOML file; raises ModelError naming the file and what is wrong in it.

    Keys are the fields of `Family`; `like = "llama"` starts from a row of the table; `gate = ""` says that the FFN has
    no gate.
    """
    table = _table(path)
    like = table.pop("like", None)
    if like is not None and like not in FAMILIES:
        near = get_close_matches(str(like), FAMILIES, n=1, cutoff=0.0)[0]
        raise ModelError(f"{path}: like = '{like}' is no row of the family table", f"did you mean '{near}'?")
    known = {part.name: part for part in fields(Family)}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it may hold {', '.join(known)}"
            raise ModelError(f"{path}: a family's row has no '{key}'", hint)
    values = {} if like is None else asdict(FAMILIES[like])
    values |= {key: _value(path, key, value) for key, value in table.items()}
    missing = [name for name, part in known.items() if part.default is MISSING and name not in values]
    if missing or (like is not None and "model_type" not in table):
        raise ModelError(f"{path} does not say `model_type`", 'add model_type = "..." as in the model\'s config.json')
    row = Family(**values)
    content = repr(sorted(asdict(row).items()))
    return FamilyFile(path=path, row=row, sha256=hashlib.sha256(content.encode()).hexdigest())


def as_toml(row: Family) -> str:
    """The row as a file that `read_family` takes; what is as in every row is left out, but for the paths."""
    lines = []
    for part in fields(Family):
        value = getattr(row, part.name)
        if part.name == "router" and row.experts is None:
            continue
        if value != part.default or isinstance(value, (str, tuple)):
            lines.append(f"{part.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _table(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ModelError(
                f"{path} is {path.stat().st_size} bytes: no row of a family", "give a TOML file of one row"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"the family's row {path} cannot be read: {error.strerror}", "check the path given with --family"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not TOML: {error}", "start from `actsparse models llama > row.toml`") from None


def _value(path: Path, key: str, value: Any) -> Any:
    """A value of the file as the row holds it; raises ModelError where it is of another type."""
    if key == "qkv":
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ModelError(f"{path}: qkv must be a list of paths", 'write qkv = ["q_proj", "k_proj", "v_proj"]')
    kind = bool if key in ("transposed", "attention_interface", "static_cache") else str
    if not isinstance(value, kind):
        wanted = "true or false" if kind is bool else "a path in quotes"
        raise ModelError(f"{path}: {key} must be {wanted}, not {value!r}", "correct the value")
    return None if key in OPTIONAL and value == "" else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{one}"' for one in value) + "]"
    return f'"{value or ""}"'
