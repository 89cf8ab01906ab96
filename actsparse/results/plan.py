"""A method fitted to a model (`plan.json`), with the sparsity that it predicts and what it did where it was run."""

from dataclasses import dataclass, field

from actsparse.results.manifest import SCHEMA_VERSION, TextRecord
from actsparse.results.model import ModelRecord
from actsparse.results.sites import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Shares not used in a decode step, each on its own basis; None where a basis does not apply.

    `neuron_frac`: neurons; `channel_frac`: input channels, weighted by the bytes of the projections; `head_frac`: KV
    groups of heads.
    """

    neuron_frac: float | None
    mlp_bytes_frac: float
    model_bytes_frac: float
    channel_frac: float | None = None
    head_frac: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What a plan does to one unit of one layer: how many of `width` are kept (None: decided at run time), its
    threshold, and the share that it is predicted to drop.

    `recall`: share of the units in use that a trained router found on held-out tokens, and the same corrected for
    chance; `epoch`: the epoch of training that it is from. None without a router, or where it was trained elsewhere.
    `rule`: whose rule it is, in a mix of several methods.
    """

    layer: int
    unit: Unit = Unit.NEURON
    width: int
    kept: int | None = None
    threshold: float | None = None
    dropped: float | None = None
    rule: str | None = None
    recall: float | None = None
    recall_corrected: float | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """What a plan did to one unit of one layer on a text: the share dropped, and the mean relative error of the output
    on dense inputs."""

    layer: int
    unit: Unit
    dropped: float
    rel_err: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPlan:
    """What a plan did on a text at positions P..S-1 of its blocks, on dense activations: sparsity on every basis, the
    mean of the layers' relative errors, and every layer."""

    text: TextRecord
    realised: Sparsity
    rel_err: float
    layers: tuple[MeasuredLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdPlan:
    """A method fitted to a model: everything but its tensors (`plan.json`; tensors in `plan.safetensors`).

    `short` is the form as typed, or what a target was solved to. `predicted` sparsity follows from the fit, `realised`
    was counted on the calibration text (None where a method decides at run time and was not replayed). `measured`:
    what it did to calibration blocks, and to the transfer text, where these were run. `ideal`: a ruler, whose masks
    need what they would save: it saves nothing, and its bytes are those of masks known beforehand.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    short: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    amount: float | None
    target: str
    model: ModelRecord
    calibration: TextRecord | None
    predicted: Sparsity
    realised: Sparsity | None
    layers: tuple[LayerPlan, ...]
    measured: tuple[MeasuredPlan, ...] = ()
    ideal: bool = False
