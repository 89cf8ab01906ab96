"""The rows of a profile's tables."""

from dataclasses import dataclass

# The phases of a profile: what a prompt's tokens activate, and what the tokens that the model writes itself do.
PREFILL, DECODE = "prefill", "decode"


def param(**values: object) -> str:
    """The `param` column: `key=value[,key=value]`, keys sorted (a trailing underscore of a key is dropped)."""
    texts = {key.rstrip("_"): f"{v:g}" if isinstance(v, float) else str(v) for key, v in values.items()}
    return ",".join(f"{key}={texts[key]}" for key in sorted(texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One row of `measures.parquet`: a measured value of a layer (None: the whole model) and a kind."""

    metric: str
    layer: int | None = None
    kind: str | None = None
    param: str = ""
    value: float | None
    unit: str
    n: int
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronRow:
    """One row of `neurons.parquet`, over the recorded tokens.

    `active_frac`: share of tokens in which the neuron is in the top 20 % of its layer by |a|*||w||; `nonzero_frac`:
    share with a != 0; `mean_norm`: mean |a|*||w||; `griffin`: sqrt(mean (a/||a||)^2). In a mixture of experts a row
    belongs to a neuron of one `expert` (-1: the shared one), over the `tokens` that were routed to it.
    """

    layer: int
    neuron: int
    active_frac: float
    nonzero_frac: float
    mean_abs: float
    max_abs: float
    mean_norm: float
    griffin: float
    mean: float
    mean_square_up: float | None
    expert: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """One row of `heads.parquet`: mean output norm of a head or KV group, and its share of the layer's total."""

    layer: int
    unit: str
    index: int
    mean_norm: float
    share: float
