"""`sparsify`: a loaded model decodes sparsely, whoever drives it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, get_args

from torch import nn
from transformers import PreTrainedModel

from actsparse.engine.generation import sparse_generation
from actsparse.engine.stepping import Decode
from actsparse.errors import ModelError, PlanError
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import check_layers, from_record, gates_of, with_add_ons
from actsparse.methods.short import parse
from actsparse.models.family_file import read_family
from actsparse.models.record import activation_of, places_of
from actsparse.models.sites import ModelSites, resolve, unit_widths
from actsparse.pipelines.calibration import TextCalibration
from actsparse.results import ModelRecord
from actsparse.store import tensors
from actsparse.store.runs import PlanRun


@contextmanager
def sparsify(
    model: PreTrainedModel,
    plan: str | Path,
    *,
    sink_tokens: int = 4,
    when_slower: Decode = "sparse",
    fast_atomics: bool = False,
    family: str | Path | None = None,
) -> Iterator[PreTrainedModel]:
    """The model under a plan: `with sparsify(model, "griffin@0.5"): model.generate(...)`.

    `plan` is a directory that `threshold` wrote, or a short form that needs no calibration text (griffin). Prompts run
    dense; decoded tokens run sparse, so a harness that scores a text in one forward pass measures the dense model (a
    warning says so). Leaving the block restores the model bit for bit. Raises PlanError where the plan does not fit the
    model, or needs text to be fitted on, ModelError where the model is none of transformers. `family` is a file with
    the row of a family that the table lacks.
    A plan that is measured no faster than dense is warned of; with `when_slower="dense"` one that loses every
    pair of the probe then decodes dense (not by default: what drives the model may measure the plan's quality).
    `fast_atomics`: on a GPU, products that skip inputs add their parts in any order: faster, and texts may differ from
    one run to the next where two tokens are nearly as likely; elsewhere a warning says that it changes nothing.
    """
    _check_arguments(model, sink_tokens, when_slower)
    sites = resolve(model, None if family is None else read_family(Path(family)).row)
    gates = gates_for(sites, plan)
    how = sparse_generation(sites, gates, sink_tokens=sink_tokens, when_slower=when_slower, fast_atomics=fast_atomics)
    with how:
        yield model


def gates_for(sites: ModelSites, plan: str | Path) -> list[LayerGates]:
    """The gates of a plan directory, or of a short form that needs no text; raises PlanError as `sparsify` does."""
    if not isinstance(plan, str | Path):
        raise PlanError(
            f"a plan is a short form or a directory, and no {type(plan).__name__}",
            'write for example sparsify(model, "griffin@0.5")',
        )
    places = places_of(sites)
    path = Path(plan).expanduser()
    if path.is_dir():
        run = PlanRun.open(path)
        read = from_record(run.plan, tensors.read(run.path / "plan.safetensors"), str(plan))
        check_layers(read, len(sites.layers), unit_widths(sites))
        _check_shape(sites, run.plan.model, str(plan))
        return read.gates()
    short = parse(str(plan))
    short.method.check(sites.gated)
    short.method.check_experts(places)
    widths = tuple(place.width for place in places)
    calibration = TextCalibration(widths, _needs_text, _needs_text, places=places)
    fit = with_add_ons(short.method.fit(calibration, short.budget), short.add_ons, calibration)
    return gates_of(short.method, fit, short.add_ons)


def _check_arguments(model: object, sink_tokens: int, when_slower: str) -> None:
    """Raise ActsparseError where `sparsify` was not given what it takes."""
    # a wrapped model (an adapter's, a compiled one) is no PreTrainedModel itself
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise ModelError(
            f"sparsify takes a loaded model of transformers, and no {type(model).__name__}",
            "load one: AutoModelForCausalLM.from_pretrained(NAME)",
        )
    if sink_tokens < 0:
        raise PlanError(f"sink_tokens must be at least 0, not {sink_tokens}", "leave it out: the default is 4")
    if when_slower not in get_args(Decode):
        raise PlanError(
            f"when_slower cannot be '{when_slower}'", f"it is one of {', '.join(map(str, get_args(Decode)))}"
        )


def _check_shape(sites: ModelSites, fitted: ModelRecord, name: str) -> None:
    """Raise PlanError where a plan was plainly fitted to another model (its weights are not hashed again here)."""
    config = sites.model.config
    here = (config.model_type, config.vocab_size, activation_of(sites))
    if here != (fitted.model_type, fitted.vocab_size, fitted.activation):
        raise PlanError(f"the plan {name} was fitted to {fitted.resolved}, another model", "fit one to this model")


def _needs_text() -> NoReturn:
    raise PlanError(
        "this plan must be fitted on text first", "make it with `actsparse threshold`, and give its directory"
    )
