"""All methods by name, ours and those that other packages add through the entry-point group `actsparse.methods`."""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from actsparse.errors import PlanError
from actsparse.methods.base import Method

OURS = {
    "random": "random:Random",
    "static": "static:Static",
    "channels-random": "channel_controls:ChannelsRandom",
    "channels-static": "channel_controls:ChannelsStatic",
    "heads-random": "head_controls:HeadsRandom",
    "heads-static": "head_controls:HeadsStatic",
    "oracle-a": "oracles:OracleA",
    "oracle-n": "oracles:OracleN",
    "oracle-gate": "oracles:OracleGate",
    "oracle-up": "oracles:OracleUp",
    "cett": "cett:Cett",
    "tda": "tda:Tda",
    "griffin": "griffin:Griffin",
    "coreinfer": "coreinfer:CoreInfer",
    "cats": "cats:Cats",
    "chess": "chess:Chess",
    "countdown": "countdown:Countdown",
    "teal": "teal:Teal",
    "wina": "wina:Wina",
    "rsparse": "rsparse:RSparse",
    "larosa": "larosa:LaRoSA",
    "auto": "auto:Auto",
    "dejavu": "dejavu:DejaVu",
    "moefication": "moefication:MoEfication",
    "heads-oracle": "heads_oracle:HeadsOracle",
    "heads-router": "heads_router:HeadsRouter",
}
GROUP = "actsparse.methods"


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every method's class by name, in the order of the docs."""
    found = {}
    for name, place in OURS.items():
        module, _, attribute = place.partition(":")
        found[name] = getattr(import_module(f"actsparse.methods.{module}"), attribute)
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise PlanError(
                f"the package {point.value} adds a method '{point.name}', a name that is taken", "rename it"
            )
        try:
            found[point.name] = point.load()
        except (ImportError, AttributeError) as error:
            raise PlanError(
                f"the method '{point.name}' cannot be loaded from {point.value}: {error}",
                "repair or remove its package",
            ) from None
    return found


def method_class(name: str) -> type[Method]:
    """The class of a method; raises PlanError with the nearest name."""
    methods = all_methods()
    if name in methods:
        return methods[name]
    near = get_close_matches(name, methods, n=1)
    raise PlanError(
        f"there is no method '{name}'", (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(methods)}"
    )
