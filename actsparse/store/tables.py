"""Tables as parquet: a record class is the schema of its table, one field a column."""

import io
import types
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import polars as pl

from actsparse.errors import RunError
from actsparse.store.files import damaged, missing, write_bytes

FEW_ROWS = 1_000_000
ROWS_A_BYTE = 16

COLUMN_TYPES: dict[type, Any] = {int: pl.Int64, float: pl.Float64, str: pl.String, bool: pl.Boolean}


def schema_of(record: type) -> dict[str, Any]:
    """Column names and polars types of a record class."""
    hints = get_type_hints(record)
    return {field.name: COLUMN_TYPES[_plain(hints[field.name])] for field in fields(record)}


def _plain(hint: Any) -> type:
    """The type of a column, without `| None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def frame(rows: Iterable[Any], record: type) -> pl.DataFrame:
    """The rows as a frame with the columns of `record`."""
    return pl.DataFrame([asdict(row) for row in rows], schema=schema_of(record), orient="row")


def _check_size(path: Path) -> None:
    """Refuse a file that unpacks into far more rows than its bytes can honestly hold; raises RunError."""
    rows, size = pl.scan_parquet(path).select(pl.len()).collect().item(), path.stat().st_size
    if rows > max(FEW_ROWS, ROWS_A_BYTE * size):
        raise RunError(f"{path} claims {rows:,} rows in {size:,} bytes, more than any run writes", "do not use it")


def write(path: Path, table: pl.DataFrame) -> None:
    """Write a table, whole or not at all."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, statistics=False)
    write_bytes(path, buffer.getvalue())


def read(path: Path, record: type) -> pl.DataFrame:
    """The table at `path` with the columns of `record`; raises RunError where it is absent, damaged or of another form.

    A column that is younger than the run is null (or its default) where the record allows that, and one that this
    version does not know is left out: columns may be added under one schema number, never changed.
    """
    if not path.exists():
        raise missing(path)
    try:
        _check_size(path)
        table = pl.read_parquet(path)
    # polars panics on some damaged files, and a panic is no Exception
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise damaged(path, error) from None
    expected, known = schema_of(record), dict(table.schema)
    optional = _optional(record)
    changed = {name for name, kind in expected.items() if name in known and known[name] not in (kind, pl.Null)}
    lacking = [name for name in expected if name not in known and name not in optional]
    if changed or lacking:
        raise RunError(
            f"{path} has columns {known}, which lack or change {sorted(changed | set(lacking))}",
            "it was written by another version; repeat the command that made the run with --force",
        )
    return table.select(
        pl.col(name).cast(kind) if name in known else pl.lit(optional[name], kind).alias(name)
        for name, kind in expected.items()
    )


def _optional(record: type) -> dict[str, Any]:
    """The columns that may be missing, with what stands there then: the field's default, or null."""
    hints = get_type_hints(record)
    found = {}
    for field in fields(record):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif type(None) in get_args(hints[field.name]):
            found[field.name] = None
    return found
