"""`actsparse models`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actsparse.cli.options import OutputOptions, grouped
from actsparse.cli.output import Output

if TYPE_CHECKING:
    from actsparse.models.families import Family

HELP = "List the model families, and what is supported on each; with a name, its row as TOML."
EPILOG = "Example: actsparse models llama > row.toml"
COLUMNS = ("model type", "FFN", "neurons", "heads", "engine")
ENGINES = {
    1: "tier 1: own step, all kernels",
    2: "tier 2: its own step, captured",
    3: "tier 3: eager, sliced",
}


@grouped
def command(
    name: Annotated[str | None, typer.Argument(help="One model type: its row, as a file.", metavar="TYPE")] = None,
    *,
    show: OutputOptions,
) -> None:
    from actsparse.models.families import FAMILIES, family_of
    from actsparse.models.family_file import as_toml
    from actsparse.store.codec import pretty

    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    rows = [family_of(name)] if name else sorted(FAMILIES.values(), key=lambda row: (row.tier, row.model_type))
    if output.json:
        output.document(pretty([describe(row) for row in rows]))
    elif name:
        cells = dict(zip(COLUMNS, cells_of(rows[0]), strict=True))
        output.line("# " + "; ".join(f"{key}: {value}" for key, value in cells.items()))
        output.line(as_toml(rows[0]).rstrip())
    else:
        output.table("", COLUMNS, [cells_of(row) for row in rows])
        output.note("next: actsparse models TYPE for one row; --family row.toml brings your own (docs/add-a-family.md)")


def describe(row: "Family") -> dict[str, Any]:
    """What is supported on a family, as one record of `models --json`."""
    return {
        "model_type": row.model_type,
        "gated": row.gate is not None,
        "neurons": "per expert" if row.experts is not None else "yes",
        "heads": "masks and KV policies" if row.attention_interface else "norms only",
        "experts": row.experts is not None,
        "engine_tier": row.tier,
        "row": asdict(row),
    }


def cells_of(row: "Family") -> list[str]:
    """The cells of a family in the table."""
    found = describe(row)
    return [
        row.model_type,
        "gated" if found["gated"] else "plain",
        found["neurons"],
        found["heads"],
        ENGINES[row.tier],
    ]
