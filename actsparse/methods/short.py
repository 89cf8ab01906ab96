"""The short form of a plan: `method[:key=value,...][@x]`, x being the share dropped of the method's own units."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

from actsparse.errors import PlanError
from actsparse.methods.add_ons import AddOns
from actsparse.methods.base import Budget, Method
from actsparse.methods.registry import method_class

DENSE = "dense"
NO_ADD_ONS = AddOns()
ERROR_TARGETS = ("target_error", "target")
MOST_STEPS = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortForm:
    """A parsed short form: the method with its options, and how much to drop."""

    text: str
    method: Method
    budget: Budget
    add_ons: AddOns = NO_ADD_ONS

    @property
    def needs_statistics(self) -> bool:
        """Whether a fit asks for statistics of calibration text."""
        return self.method.needs_statistics or bool(self.add_ons)

    @property
    def needs_text(self) -> bool:
        """Whether a fit asks for calibration text at all."""
        return self.needs_statistics or self.method.needs_replay or self.budget.target_error is not None


def parse(text: str) -> ShortForm:
    """The method and budget of a short form; raises PlanError naming the part that does not fit."""
    head, at, amount = text.partition("@")
    name, _, listed = head.partition(":")
    cls = method_class(name.strip())
    given = dict(_pair(item, text) for item in listed.split(",") if item.strip()) if listed else {}
    target = next((parse_share(given.pop(key), key) for key in ERROR_TARGETS if key in given), None)
    drop = parse_share(amount, "the share dropped") if at else None
    if drop is not None and target is not None:
        raise PlanError(f"'{text}' gives both a share and an error target", "give one of the two")
    if drop is None and target is None and not cls.takes_error_target:
        raise PlanError(f"'{text}' does not say how much to drop", f"write {head}@0.5")
    method, add_ons = build(cls, given)
    return ShortForm(text=text, method=method, budget=Budget(drop=drop, target_error=target), add_ons=add_ons)


def expand(text: str) -> list[str]:
    """The short forms of a sweep: `griffin@0.1:0.9:0.2` is griffin@0.1, @0.3, .. @0.9 (first:last:step, the last
    included); any other text stands for itself. Raises PlanError where a sweep is malformed."""
    head, at, amounts = text.rpartition("@")
    if not at or ":" not in amounts:
        return [text]
    parts = amounts.split(":")
    if len(parts) != 3:
        raise PlanError(f"'{text}' is no sweep: '{amounts}' is not first:last:step", f"write {head}@0.1:0.9:0.1")
    first, last, step = (parse_share(part, "a sweep's first, last and step") for part in parts)
    if step <= 0 or last < first:
        raise PlanError(f"'{text}' is an empty sweep", "the step must be above 0, and the last not before the first")
    steps = (last - first) / step + 1e-9
    if steps >= MOST_STEPS:
        raise PlanError(f"'{text}' is a sweep of more than {MOST_STEPS} plans", "take a larger step")
    return [f"{head}@{first + step * i:.12g}" for i in range(int(steps) + 1)]


def parse_share(text: str, what: str) -> float:
    """`0.05` or `5%` as a number in [0, 1); raises PlanError otherwise."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise PlanError(f"{what} is not a number: '{text}'", "write a share such as 0.5 or 50%") from None
    if not 0.0 <= value < 1.0:
        raise PlanError(f"{what} must be at least 0 and below 1, not {text}", "write a share such as 0.5 or 50%")
    return value


def build(cls: type[Method], given: dict[str, str]) -> tuple[Method, AddOns]:
    """A method and add-ons with options from text; raises PlanError on an unknown name or a value of the wrong type."""
    own, extra = option_types(cls), option_types(AddOns)
    known = extra | own  # an option of the method itself comes before an add-on of the same name
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            names = ", ".join(known) or "none"
            raise PlanError(
                f"{cls.name} has no option '{key}'",
                (f"did you mean '{near[0]}'? " if near else "") + f"it has: {names}",
            )
        values[key] = _value(cls.name, key, value, known[key])
    add_ons = AddOns(**{key: value for key, value in values.items() if key not in own})
    return cls(**{key: value for key, value in values.items() if key in own}), add_ons


def option_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name."""
    hints = get_type_hints(cls)
    return {part.name: hints[part.name] for part in fields(cls)}


def _pair(item: str, text: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise PlanError(f"'{text}': '{item}' is not key=value", "write method:key=value,key=value@0.5")
    return key.strip(), value.strip()


def _value(method: str, key: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is not None and get_args(hint):
        if text in get_args(hint):
            return text
        raise PlanError(f"{method}: {key} cannot be '{text}'", f"it is one of {', '.join(map(str, get_args(hint)))}")
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise PlanError(f"{method}: {key} cannot be '{text}'", "it is true or false")
    try:
        return hint(text)
    except ValueError:
        raise PlanError(f"{method}: {key} must be a {hint.__name__}, not '{text}'", "correct the value") from None
