"""`actsparse methods`."""

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from actsparse.cli.options import OutputOptions, grouped
from actsparse.cli.output import Output

if TYPE_CHECKING:
    from actsparse.methods.base import Method

HELP = "List the methods: when each decides, what it reads, what it saves, what it is fitted on."
EPILOG = "Example: actsparse methods tda"
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
COLUMNS = ("method", "decides", "reads", "saves", "fitted on", "FFN", "runs")


@grouped
def command(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.", metavar="NAME")] = None,
    *,
    show: OutputOptions,
) -> None:
    from actsparse.methods.registry import all_methods, method_class
    from actsparse.store.codec import pretty

    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    chosen = [method_class(name)] if name else list(all_methods().values())
    found = [describe(cls) for cls in chosen]
    if output.json:
        output.document(pretty(found))
        return
    output.table("", COLUMNS, [row(one) for one in found])
    if name:
        output.line(f"\n{found[0]['summary']} ({found[0]['source']})")
        if found[0]["caution"]:
            output.line(f"speed: {found[0]['caution']}")
        for key, option in found[0]["options"].items():
            default = str(option["default"]).lower() if option["type"] == "bool" else option["default"]
            output.line(f"  {key}={default}  ({' | '.join(option['values']) or option['type']})")
    else:
        output.note("next: actsparse methods NAME for the options of one")


def describe(cls: "type[Method]") -> dict[str, Any]:
    """What a method needs, saves and takes, as one record of `methods --json`."""
    method = cls()
    return {
        "method": cls.name,
        "summary": cls.summary,
        "source": cls.paper,
        "caution": cls.caution,
        "decides": cls.decides.value,
        "reads": [kind.value for kind in cls.needs],
        "saves": [] if cls.ideal else [name for name in MATRICES if name in cls.saves],
        "ideal": cls.ideal,
        "fitted_on": _fitted_on(method),
        "gated_only": cls.gated_only,
        "serves_experts": cls.serves_experts,
        "engine": cls.has_engine,
        "takes_error_target": cls.takes_error_target,
        "options": {part.name: _option(cls, part.name, part.default) for part in fields(cls)},
    }


def row(record: dict[str, Any]) -> list[str]:
    """The cells of a method in the table."""
    return [
        record["method"],
        record["decides"],
        ", ".join(record["reads"]),
        "nothing (ruler)" if record["ideal"] else ", ".join(record["saves"]),
        record["fitted_on"],
        "gated" if record["gated_only"] else "any" if record["serves_experts"] else "dense",
        "engine" if record["engine"] else "masked only",
    ]


def _fitted_on(method: "Method") -> str:
    """`nothing`, the tables of a `profile`, or the `text` itself, which runs through the model again."""
    if method.needs_replay:
        return "text"
    return "profile" if method.needs_statistics else "nothing"


def _option(cls: "type[Method]", name: str, default: Any) -> dict[str, Any]:
    hint = get_type_hints(cls)[name]
    listed = get_args(hint) if get_origin(hint) is not None else ()
    return {
        "type": "choice" if listed else hint.__name__,
        "default": None if default is MISSING else default,
        "values": [str(value) for value in listed],
    }
