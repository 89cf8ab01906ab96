"""Reading the long tables: numbers out of `param`, and plain floats out of frames."""

import math

import polars as pl


def param(key: str, *, of: str = "param") -> pl.Expr:
    """The number under `key` in text of the form `key=value[,key=value]`; null where it is absent or no number."""
    return param_text(key, of=of).cast(pl.Float64, strict=False)


def param_text(key: str, *, of: str = "param") -> pl.Expr:
    """The text under `key`; null where it is absent."""
    return pl.col(of).str.extract(rf"(?:^|,){key}=([^,]*)")


def as_float(value: object) -> float:
    """A frame's scalar as a float; NaN where it is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def first_known(values: pl.Series) -> float | None:
    """The first value that is not null."""
    known = values.drop_nulls()
    return as_float(known[0]) if len(known) else None
