"""The statistic of a prompt that TDA and GRIFFIN share (methods.md, section 3; GRIFFIN, arXiv 2404.01365).

`core.griffin` has its formula; here it is summed up over calls and read at last.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from actsparse.core.griffin import share_squares
from actsparse.errors import PlanError
from actsparse.results import SiteKind

Source = Literal["a", "n", "gate", "up"]
SITES = {"a": SiteKind.NEURON, "n": SiteKind.NEURON, "gate": SiteKind.GATE, "up": SiteKind.UP}


class PromptStatistic:
    """s of the prompt tokens added so far; float32 within a call, float64 across calls.

    `norms` [neurons]: rows are a_tj * ||w_j|| instead of a_tj. `first`: only this many tokens count (0: all).
    """

    def __init__(self, norms: Float[Tensor, " neurons"] | None = None, first: int = 0) -> None:
        self._norms = norms
        self._first = first
        self._squares: Tensor | None = None
        self._rows = 0
        self.tokens = 0

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        if self._first:
            rows = rows[: max(0, self._first - self.tokens)]
        self.tokens += len(rows)
        values = rows.float() if self._norms is None else rows.float() * self._norms.to(rows.device)
        total, used = share_squares(values)
        self._squares = total if self._squares is None else self._squares + total
        self._rows += used

    def value(self) -> Float[Tensor, " neurons"]:
        """s [neurons], in float64; all zero when no row had a norm. Raises ValueError before the first token."""
        if self._squares is None:
            raise ValueError("the prompt has no token after the sink tokens")
        return (self._squares / max(1, self._rows)).sqrt()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReading:
    """What the statistic reads of a prompt: neuron activations (`a`), neuron outputs (`n`: a_j * ||w_j||), gate
    activations (`gate`: act(g)) or up projections (`up`), of the `first` tokens after the sink tokens only (0: of
    all)."""

    source: Source = "a"
    first: int = 0

    def check(self, method: str, gated: bool) -> None:
        """Raise PlanError where a model whose FFN is (not) gated lacks what is read."""
        if self.source == "up" and not gated:
            raise PlanError(
                f"{method}: source=up needs a gated FFN, and this model's has two matrices only",
                "use source=a, n or gate",
            )

    @property
    def site(self) -> SiteKind:
        """Where it reads."""
        return SITES[self.source]

    def statistic(self, norms: Float[Tensor, " neurons"] | None) -> PromptStatistic:
        """A statistic that has seen nothing yet; `norms` are needed by the source `n`."""
        assert self.source != "n" or norms is not None
        return PromptStatistic(norms if self.source == "n" else None, self.first)
