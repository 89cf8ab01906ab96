"""What a plan's short form says: its method, its options, how much it drops, and the role it plays in a comparison."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath

from actsparse.report.wording import one_line, percent

_SHORT = re.compile(r"^(?P<method>[a-z][a-z0-9_-]*)(?::(?P<options>[^@]*))?(?:@(?P<amount>[0-9.]+(?:e-?[0-9]+)?))?$")

ACRONYMS = ("cats", "cett", "chess", "griffin", "tda", "teal", "wina")
NAMES = {
    "channels-random": "Random mask",
    "channels-static": "Static mask",
    "coreinfer": "CoreInfer",
    "countdown": "COUNTDOWN",
    "dejavu": "Deja Vu",
    "larosa": "LaRoSA",
    "heads-oracle": "Oracle by head output norm",
    "heads-random": "Random mask",
    "heads-router": "Head router",
    "heads-static": "Static mask",
    "moefication": "MoE-fication",
    "oracle-a": "Oracle by |a|",
    "oracle-gate": "Oracle by |act(g)|",
    "oracle-n": "Oracle by |a|·‖w‖",
    "oracle-up": "Oracle by |u|",
    "random": "Random mask",
    "rsparse": "R-Sparse",
    "static": "Static mask",
}
KNOWN = {*ACRONYMS, *NAMES, "dense", "heads-router", "auto"}
CHANNEL_METHODS = ("teal", "wina", "rsparse", "larosa", "channels-random", "channels-static")
PROMPT_METHODS = ("griffin", "tda", "coreinfer")


class Role(StrEnum):
    DENSE = "dense"
    METHOD = "method"
    RANDOM = "random"
    STATIC = "static"
    ORACLE = "oracle"


STATISTICS = {
    "static": {"griffin": "by GRIFFIN's statistic", "mean_n": "by mean neuron norm"},
    "channels-static": {"mean_n": "by mean |x|·‖w‖", "mean_abs": "by mean |x|"},
    "heads-static": {"mean_n": "by mean output norm"},
}
ROLES = {
    "dense": Role.DENSE,
    **dict.fromkeys(("random", "channels-random", "heads-random"), Role.RANDOM),
    **dict.fromkeys(STATISTICS, Role.STATIC),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanName:
    """A plan as its run names it and what it means.

    `short` is its short form: `plan` itself, or what the plan directory `plan` holds. `series` is the short form
    without its amount, shared by the plans of one line.
    """

    plan: str
    short: str
    method: str
    options: str
    amount: float | None
    series: str
    role: Role

    @property
    def title(self) -> str:
        """The plan in words: `GRIFFIN at 50 % of neurons`."""
        if self.role is Role.DENSE:
            return "Dense"
        name = method_title(self.method)
        if not is_short(self.short):
            where = self.short.removeprefix(f"{self.method} ").strip("()")
            return f"{name} ({one_line(where)})"
        if (error := self.target_error) is not None:
            return f"{name} at an error of {error:g}"
        qualifier = self._qualifier()
        head = f"{name} {qualifier}" if qualifier.startswith("by ") else f"{name} ({qualifier})" if qualifier else name
        if self.amount is None:
            return head
        share = percent(self.amount, 0 if abs(100 * self.amount - round(100 * self.amount)) < 0.05 else 1)
        return f"{head} at {share} of {self.unit}"

    @property
    def target_error(self) -> float | None:
        """The error that the plan was fitted to, where that is all its options say."""
        options = _options(self.options)
        return _float(options[0][1]) if len(options) == 1 and options[0][0] in ("target_error", "target") else None

    @property
    def unit(self) -> str:
        """What a share of this plan counts."""
        if self.method in CHANNEL_METHODS:
            return "input channels"
        if self.method == "auto":
            return "the model's bytes"
        return "KV groups" if self.method.startswith("heads") else "neurons"

    def _qualifier(self) -> str:
        options = dict(_options(self.options))
        parts = []
        if self.role is Role.STATIC:
            statistic = options.pop("stat", "mean_n")
            parts.append(STATISTICS[self.method].get(statistic, f"by {statistic}"))
        return one_line(", ".join(parts + [f"{key.replace('_', ' ')} {value}" for key, value in options.items()]))


def method_title(method: str) -> str:
    """A method's name as its authors write it."""
    if method in ACRONYMS:
        return method.upper()
    return one_line(NAMES.get(method, method.replace("-", " ").replace("_", " ")))


def parse_plan(plan: str, method: str | None = None, short: str | None = None) -> PlanName:
    """The parts of a plan as its run names it; of a plan directory `short` says the short form, else `method` the
    method."""
    short = plan if is_short(plan, method) or short is None else short
    found = _SHORT.match(short)
    if found is None or (method is not None and found["method"] != method):
        name = method or PurePath(plan).name or plan
        known = f"{name} ({PurePath(plan).name})" if method and "/" in plan else plan
        return PlanName(plan=plan, short=known, method=name, options="", amount=None, series=known, role=role_of(name))
    amount = _float(found["amount"])
    options = found["options"] or ""
    series = f"{found['method']}:{options}" if options else found["method"]
    return PlanName(
        plan=plan,
        short=short,
        method=found["method"],
        options=options,
        amount=amount,
        series=series,
        role=role_of(found["method"], options),
    )


def is_short(plan: str, method: str | None = None) -> bool:
    """Whether a plan's name is a short form, and not a directory's."""
    found = _SHORT.match(plan)
    return found is not None and (method is None or found["method"] == method)


def method_of(plan: str) -> str:
    """The series of a short form whose method is known to the project; empty for any other text."""
    found = _SHORT.match(plan)
    if found is None or found["method"] not in KNOWN:
        return ""
    return f"{found['method']}:{found['options']}" if found["options"] else found["method"]


def role_of(method: str, options: str = "") -> Role:
    """The role of a method in a comparison: what it is measured against, or what is measured."""
    if method.startswith("oracle") or method == "heads-oracle" or ("router", "oracle") in _options(options):
        return Role.ORACLE
    return ROLES.get(method, Role.METHOD)


def _options(text: str) -> list[tuple[str, str]]:
    return [(key.strip(), value.strip()) for key, _, value in (part.partition("=") for part in text.split(",")) if key]


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
