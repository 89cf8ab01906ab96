"""CoreInfer: the neurons that are most often among a prompt token's strongest (arXiv 2410.18311)."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.masks import top_mask
from actsparse.core.overlap import topk_masks
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import LayerGates, PrefillGate

TOKEN_FRAC = 0.4


class CoreShare:
    """In which share of the prompt's tokens a neuron is in the top set: the `token_frac` largest of |a|, zeros never.

    The authors' code ranks signed values; the neurons of a gated FFN write as much when a is negative.
    """

    def __init__(self, token_frac: float) -> None:
        self._token_frac = token_frac
        self._counts: Tensor | None = None
        self._tokens = 0

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        top = topk_masks(rows.abs().float(), self._token_frac) & (rows != 0)
        counts = top.count_nonzero(dim=0)
        self._counts = counts if self._counts is None else self._counts + counts
        self._tokens += len(rows)

    def value(self) -> Float[Tensor, " neurons"]:
        """Shares [neurons], in float64. Raises ValueError before the first token."""
        if self._counts is None:
            raise ValueError("the prompt has no token after the sink tokens")
        return self._counts.to(torch.float64) / self._tokens


def check_token_frac(token_frac: float, method: str) -> None:
    """Raise PlanError where the share of a token's top set is none."""
    if not 0 < token_frac <= 1:
        raise PlanError(
            f"{method}: token_frac must be above 0 and at most 1, not {token_frac:g}",
            "it is the share of neurons in a token's top set; the paper's is 0.4",
        )


@dataclass(frozen=True, kw_only=True)
class CoreInfer(Method):
    """The r*f neurons that are in the top set of most prompt tokens (ties: the lower index)."""

    token_frac: float = TOKEN_FRAC
    refresh_every: int = 0

    name = "coreinfer"
    summary = "neurons most often strong in the prompt, one mask a sequence"
    paper = "arXiv 2410.18311"
    decides = Decides.PREFILL
    serves_experts = True

    def __post_init__(self) -> None:
        check_token_frac(self.token_frac, self.name)
        if self.refresh_every < 0:
            raise PlanError(
                f"coreinfer: refresh_every must be at least 0, not {self.refresh_every}", "0 chooses once a sequence"
            )

    @property
    def control(self) -> str:
        own = f",token_frac={self.token_frac:g}" if self.token_frac != TOKEN_FRAC else ""
        return f"static:stat=coreinfer{own}"

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        return counted_fit(counted_layers(budget, self.name, calibration.widths))

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        kept = fit.of(layer).kept
        assert kept is not None
        statistic = partial(CoreShare, self.token_frac)
        gate = PrefillGate(statistic, lambda shares: top_mask(shares, kept), refresh_every=self.refresh_every)
        return LayerGates(neurons=gate)
