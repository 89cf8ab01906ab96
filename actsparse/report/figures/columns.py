"""Reading the long tables: numbers out of `param`, and plain floats out of frames."""

import math

import polars as pl

from actsparse.report.wording import count


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


def measured(
    measures: pl.DataFrame, metric: str, *, numbers: tuple[str, ...] = (), texts: tuple[str, ...] = ()
) -> pl.DataFrame:
    """`layer` (null: the whole model), `value`, `low`, `high`, `n` and the named keys of `param`, for one metric.

    Masks are those of top-k: rows of other kinds (`masks=` in `param`) are left out. `low` and `high` come from the
    rows `<metric>_low` and `<metric>_high`, null where there are none. Rows without a value are left out: what was not
    measured is not drawn.
    """
    other_masks = pl.col("param").str.contains("masks=")
    frame = measures.filter((pl.col("metric") == metric) & pl.col("value").is_finite() & ~other_masks)
    frame = frame.select("layer", "param", "value", "n")
    for end in ("low", "high"):
        found = measures.filter(pl.col("metric") == f"{metric}_{end}").select("layer", "param", value="value")
        frame = frame.join(
            found.rename({"value": end}), on=["layer", "param"], how="left", nulls_equal=True, maintain_order="left"
        )
    keys = [param(key).alias(key) for key in numbers] + [param_text(key).alias(key) for key in texts]
    return frame.with_columns(keys).select(*numbers, *texts, "layer", "value", "low", "high", "n")


def counted(frame: pl.DataFrame, what: str) -> str:
    """` n = 64 contexts.` from the largest `n`; empty where none is known."""
    most = frame["n"].drop_nulls().max()
    return f" n = {count(most)} {what}." if isinstance(most, int) and most else ""
