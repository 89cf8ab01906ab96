"""The plans of an evaluation: as named, with the equal-density controls that stand beside every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from actsparse.data.sequences import shares_text
from actsparse.errors import PlanError
from actsparse.methods.base import Calibration
from actsparse.methods.gates import PrefillGate
from actsparse.methods.head_controls import HeadsStatic
from actsparse.methods.plan import Plan, check_layers, check_model, fit_plan, from_record
from actsparse.methods.registry import all_methods
from actsparse.methods.short import DENSE, ShortForm, expand, parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import unit_widths
from actsparse.results import Sparsity, StepBytes, TextRecord
from actsparse.store import tensors
from actsparse.store.files import sha256_of
from actsparse.store.runs import PlanRun

NEURON_CONTROLS = ("static:stat=griffin", "static", "random")
CHANNEL_CONTROLS = ("channels-static", "channels-random")
HEAD_CONTROLS = ("heads-static", "heads-random")
SAME_SHARE = 0.01
"""A share of units that is this near to a plan's amount is served by the controls at that amount."""


@dataclass(frozen=True)
class PlanGroup:
    """One plan of an evaluation with its replicas (the seeds of a random control).

    `named` is False for a control that was added; `calibration` is the text that a plan directory was fitted on.
    """

    name: str
    replicas: tuple[Plan, ...]
    named: bool = True
    calibration: TextRecord | None = None

    @property
    def plan(self) -> Plan:
        return self.replicas[0]


def check_names(names: tuple[str, ...]) -> list[str]:
    """The plans to run, sweeps expanded, without `dense` and without repeats; raises PlanError on a bad short form or
    path."""
    if any(not name.strip() for name in names):
        raise PlanError("a plan without a name is given", "name one: --plan griffin@0.5")
    every = [one for name in names for one in ([name] if Path(name).expanduser().is_dir() else expand(name))]
    kept = list(dict.fromkeys(name for name in every if name != DENSE))
    for name in kept:
        if not is_directory(name):
            _check_short(name)
    return kept


def _check_short(name: str) -> None:
    """Raise PlanError where a short form cannot be read; a bare word may have been meant as a directory."""
    if name not in all_methods() and not set(name) & set(":@"):
        near = get_close_matches(name, all_methods(), n=1)
        raise PlanError(
            f"there is no plan directory '{name}' here, and no method of that name",
            "give a directory that `actsparse threshold` wrote, or a short form such as"
            f" {near[0] if near else 'griffin'}@0.5",
        )
    parse(name)


def is_directory(name: str) -> bool:
    """Whether a plan is given as a run directory; raises PlanError where a path leads nowhere."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    # an option of a short form may name a file
    if "/" in name.partition(":")[0] or name.startswith("."):
        raise PlanError(f"there is no plan at {name}", "give a directory that `actsparse threshold` wrote")
    return False


def needs_text(names: list[str]) -> bool:
    """Whether any of the plans must be fitted on calibration text on the spot."""
    return any(parse(name).needs_text for name in names if not is_directory(name))


def identity_of(name: str) -> str:
    """What a plan is known by: the fingerprint of its run, or its short form with the content of the files it names."""
    if is_directory(name):
        return PlanRun.open(Path(name).expanduser()).manifest.fingerprint
    files = parse(name).method.files
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise PlanError(f"there is no file {missing}, which {name} names", "check the path")
    return " ".join((name, *(sha256_of(path) for path in files)))


def build(names: list[str], loaded: LoadedModel, calibration: Calibration, cost: StepBytes) -> list[PlanGroup]:
    """Every plan, fitted or read."""
    return [_group(name, loaded, calibration, cost) for name in names]


def controls_of(
    groups: list[PlanGroup],
    realised: Mapping[str, Sparsity],
    loaded: LoadedModel,
    calibration: Calibration,
    cost: StepBytes,
) -> list[PlanGroup]:
    """The controls that stand beside scored plans, at the shares of their units that these dropped (`realised`, by
    plan), the smallest share first."""
    have = {group.name for group in groups}
    wanted = [
        one
        for group in groups
        if not group.plan.method.is_control
        for one in controls_beside(group.plan, realised[group.name], cost)
    ]
    ordered = sorted(wanted, key=lambda one: one[0])
    names = dict.fromkeys(f"{form}@{share:.12g}" for share, form in ordered if 0 < share < 1)
    return [_fitted(parse(name), loaded, calibration, cost, named=False) for name in names if name not in have]


def controls_beside(plan: Plan, found: Sparsity, cost: StepBytes) -> list[tuple[float, str]]:
    """The controls of one plan, each with its share, by what the plan dropped.

    Neurons and channels at the share that was dropped; of a mix of both, the channels that are as many bytes as all
    that it drops; heads at the share dropped in the layers that drop any, under the plan's own KV policy.
    """
    wanted: list[tuple[float, str]] = []
    own = (plan.method.control,) if plan.method.control else ()
    if found.neuron_frac is not None:
        share = _share(plan, found.neuron_frac)
        wanted += [(share, form) for form in (*NEURON_CONTROLS, *own)]
    if found.channel_frac is not None:
        mixed = found.neuron_frac is not None
        share = found.model_bytes_frac * cost.total / cost.linears if mixed else found.channel_frac
        wanted += [(_share(plan, share), form) for form in (*CHANNEL_CONTROLS, *(() if mixed else own))]
    if found.head_frac is not None:
        share, options = _heads_dropped(plan, found.head_frac)
        wanted += [(_share(plan, share), form + options) for form in HEAD_CONTROLS]
    return wanted


def _heads_dropped(plan: Plan, head_frac: float) -> tuple[float, str]:
    """The share of heads dropped in the layers that may drop any, and the options of a control that keeps the same
    layers dense under the same KV policy."""
    gates = [layer.heads for layer in plan.gates()]
    sparse = [(layer, gate.policy) for layer, gate in enumerate(gates) if gate is not None]
    if not sparse:
        return 0.0, ""
    dense_layers, policy = sparse[0]
    own = HeadsStatic(policy=policy.value, dense_layers=dense_layers).options
    options = ":" + ",".join(f"{key}={value}" for key, value in own.items()) if own else ""
    return head_frac * len(gates) / (len(gates) - dense_layers), options


def prompt_warnings(groups: list[PlanGroup], prompt_length: int, sink_tokens: int) -> list[str]:
    """A warning for every plan that chooses from the prompt, where the prompt is no more than the sink tokens."""
    if prompt_length > sink_tokens:
        return []
    return [
        f"{group.name} has no prompt to choose from after the sink tokens: it keeps everything, its scores are dense"
        for group in groups
        if any(isinstance(gates.neurons, PrefillGate) for gates in group.plan.gates())
    ]


def calibration_warnings(groups: list[PlanGroup], calibration: TextRecord, quality: TextRecord) -> list[str]:
    """What is wrong with where plans were fitted: text that is evaluated too."""
    fitted_here = [group.name for group in groups if group.calibration is None]
    found = []
    if fitted_here and shares_text(calibration, quality):
        found.append(
            f"calibration text ({calibration.source}) overlaps evaluation text ({quality.source}):"
            " fitted plans look better than they are"
        )
    return found + [
        f"the plan {group.name} was fitted on text that is evaluated here ({quality.source})"
        for group in groups
        if group.calibration is not None and shares_text(group.calibration, quality)
    ]


def _group(name: str, loaded: LoadedModel, calibration: Calibration, cost: StepBytes) -> PlanGroup:
    if not is_directory(name):
        return _fitted(parse(name), loaded, calibration, cost, named=True)
    run = PlanRun.open(Path(name).expanduser())
    stored = tensors.read(run.path / "plan.safetensors")
    check_model(run.plan, name, loaded.record)
    plan = from_record(run.plan, stored, name)
    check_layers(plan, loaded.record.layers, unit_widths(loaded.sites))
    plan.method.check(loaded.record.gated)
    return PlanGroup(name, (plan,), calibration=run.plan.calibration)


def _fitted(
    short: ShortForm, loaded: LoadedModel, calibration: Calibration, cost: StepBytes, *, named: bool
) -> PlanGroup:
    plans = fit_plan(short, calibration, cost, gated=loaded.record.gated)
    return PlanGroup(short.text, tuple(plans), named=named)


def _share(plan: Plan, found: float) -> float:
    """A plan's own amount where it is what was dropped; else what was dropped, to a thousandth.

    An amount may be a share of other units (bytes), and a threshold or protected units keep another share than was
    asked for.
    """
    same = plan.amount is not None and abs(plan.amount - found) <= SAME_SHARE
    return plan.amount if same and plan.amount is not None else round(found, 3)
