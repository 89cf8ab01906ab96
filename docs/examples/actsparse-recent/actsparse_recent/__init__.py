"""`recent`: the neurons that the last tokens of a prompt used most, one mask a sequence."""

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from actsparse.core.masks import top_mask
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.gates import LayerGates, PrefillGate


class LastTokens:
    """The mean |a| / ||a|| of the last `tokens` prompt tokens."""

    def __init__(self, tokens: int) -> None:
        self._rows: deque[Tensor] = deque(maxlen=tokens)

    def add(self, rows: Tensor) -> None:
        """Add prompt tokens, [tokens, neurons]."""
        self._rows.extend(torch.nn.functional.normalize(rows.float().abs(), dim=1))

    def value(self) -> Tensor:
        """The mean over the last tokens, [neurons]."""
        return torch.stack(tuple(self._rows)).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Recent(Method):
    """The top r*f neurons by mean |a| / ||a|| over the last `last` tokens of the prompt. Its fields are its options."""

    last: int = 16

    name = "recent"
    summary = "neurons that the end of the prompt used most, one mask a sequence"
    paper = "an example"
    decides = Decides.PREFILL

    def __post_init__(self) -> None:
        if self.last < 1:
            raise PlanError(f"recent: last must be at least 1, not {self.last}", "write recent:last=16@0.5")

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        """How many neurons each layer keeps; nothing is learnt from the text."""
        return counted_fit(counted_layers(budget, self.name, calibration.widths))

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        """One mask a sequence, chosen when the prompt has ended."""
        kept = fit.of(layer).kept or 1
        return LayerGates(neurons=PrefillGate(partial(LastTokens, self.last), partial(top_mask, k=kept)))
