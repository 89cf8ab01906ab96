"""Routers in the compiled step: each runs as soon as what it reads is there, maybe a layer before its list is used."""

from collections import defaultdict

import torch
from torch import Tensor

from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.step.plans import Selection
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import Chosen, GatePlan, LayerWork, Routed
from actsparse.results import SiteKind

MOST_SIZED = 4096  # units with sizes, each of which looks at all others
MOST_BYTES = 210_000  # of shared memory for a choice: five a unit, and one a neuron where units are not neurons


class Routers:
    """All routers of a plan, and what they kept last by layer.

    neurons: index [neurons] int32, ascending up to count [1] int32; groups: [kv_heads] int32, 1 for those kept.
    """

    def __init__(self, plan: GatePlan, weights: Weights, operators: Operators, *, exact: torch.dtype) -> None:
        self.neurons: dict[int, Selection] = {}
        self.groups: dict[int, Tensor] = {}
        self._operators = operators
        self._at: dict[tuple[int, SiteKind], list[tuple[Chosen, Selection | Tensor]]] = defaultdict(list)
        shape, device = weights.shape, weights.device

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        for layer, work in enumerate(plan.layers):
            if work.heads is not None:
                self.groups[layer] = zeros(shape.kv_heads)
                self._add(layer, work.heads.router, self.groups[layer])
            if isinstance(work.mlp, Routed):
                self.neurons[layer] = Selection(index=zeros(shape.neurons), count=zeros(1))
                self._add(layer, work.mlp.router, self.neurons[layer])
        routers = [router for work in plan.layers for router in routers_of(work)]
        self._low = torch.zeros(max((_rank(one) for one in routers), default=0), dtype=exact, device=device)
        self._score = torch.zeros(max((len(one.second) for one in routers), default=0), dtype=exact, device=device)

    def run(self, layer: int, site: SiteKind, x: Tensor, norm: Norm) -> None:
        """Runs the routers, of this layer or the next, that read norm(x) [width] at a site of `layer`."""
        for router, kept in self._at[layer, site]:
            score = self._score[: len(router.second)]
            if router.first is None:
                self._operators.scores(score, x, router.second, norm=norm)
            else:
                low = self._low[: _rank(router)]
                self._operators.scores(low, x, router.first, norm=norm, tanh=router.tanh)
                self._operators.scores(score, low, router.second)
            self._operators.choose(
                kept, score, router.top, sizes=router.sizes, members=router.members, always=router.always
            )

    def _add(self, layer: int, router: Chosen, kept: Selection | Tensor) -> None:
        self._at[max(0, layer - router.ahead), router.site].append((router, kept))


def _rank(router: Chosen) -> int:
    return 0 if router.first is None else len(router.first)


def routers_of(work: LayerWork) -> list[Chosen]:
    """The routers of a layer."""
    found = [] if work.heads is None else [work.heads.router]
    return [*found, work.mlp.router] if isinstance(work.mlp, Routed) else found


def why_not_chosen(router: Chosen, neurons: int) -> str | None:
    """Why the kernels cannot run a router, or None if they can."""
    if router.site not in (SiteKind.ATTN_IN, SiteKind.MLP_IN):
        return "a router reads a site that the step does not keep"
    units, grouped = len(router.second), router.members is not None or router.always is not None
    if (router.sizes is not None and units > MOST_SIZED) or 5 * units + grouped * neurons > MOST_BYTES:
        return f"a router chooses among {units} units"
    return None
