"""Gates that choose again while they decode: every so many tokens their layer runs dense, and they see what it does."""

from collections import Counter
from collections.abc import Iterator

import torch

from actsparse.engine.gating import PlanState
from actsparse.engine.step.weights import Weights
from actsparse.engine.step.work import GatePlan, LayerWork


class Refresh:
    """The steps of `plan` in which some layers run dense; `dense_steps` counts them by layer."""

    def __init__(self, plan: GatePlan, weights: Weights, batch: int) -> None:
        self.dense_steps: Counter[int] = Counter()
        self._plan = plan
        self._weights = weights
        self._batch = batch
        self._recorders: dict[frozenset[int], GatePlan] = {}

    @property
    def recorders(self) -> Iterator[GatePlan]:
        """Every plan that ran in the place of the given one."""
        yield from self._recorders.values()

    def due(self, state: PlanState) -> list[int]:
        """The layers that run dense for the next token."""
        return [layer for layer, one in enumerate(state.neurons) if one is not None and one.due()]

    def recorder(self, dense: list[int]) -> GatePlan:
        """The plan with these layers dense, which leave their neurons' activations."""
        key = frozenset(dense)
        if key not in self._recorders:
            shape = self._weights.shape
            layers = tuple(LayerWork() if i in key else work for i, work in enumerate(self._plan.layers))
            seen = torch.zeros(shape.layers, self._batch, shape.neurons, device=self._weights.device)
            self._recorders[key] = GatePlan(layers=layers, neurons=seen)
        return self._recorders[key]

    def see(self, state: PlanState, dense: list[int]) -> None:
        """Let the gates of layers that ran dense see the token's activations."""
        self.dense_steps.update(dense)
        seen = self.recorder(dense).neurons
        assert seen is not None
        for layer in dense:
            one = state.neurons[layer]
            assert one is not None
            one.join(seen[layer])
