"""One gate in one layer at work: what it has seen of the prompt, and the masks that it opens with."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.methods.base import FixedGate, Gate, PrefillGate, Statistic
from actsparse.results import SiteKind


class GateState:
    """The state of a gate over one batch of sequences that share prompt length and positions."""

    def __init__(self, gate: Gate, *, prompt_length: int, sink_tokens: int) -> None:
        self.gate = gate
        self.prompt_length = prompt_length
        self.sink_tokens = sink_tokens
        self._statistics: list[Statistic] = []
        self._seen: list[int] = []
        self._chosen: Bool[Tensor, "batch neurons"] | None = None

    def observe(self, a: Float[Tensor, "batch seq neurons"], start: int, padding: Sequence[int] = ()) -> None:
        """See the neuron activations of positions `start` and on; only prompt tokens after the sink tokens count.

        `padding`: how many positions of padding stand in front of each sequence.
        """
        if not isinstance(self.gate, PrefillGate) or start >= self.prompt_length:
            return
        if not self._seen:
            self._statistics = [self.gate.statistic() for _ in range(a.shape[0])]
            self._seen = [0] * a.shape[0]
        for index, sequence in enumerate(a):
            left = padding[index] if padding else 0
            rows = sequence[max(0, left + self.sink_tokens - start) : self.prompt_length - start]
            if len(rows):
                self._statistics[index].add(rows)
                self._seen[index] += len(rows)

    def masks(
        self, values: Mapping[SiteKind, Float[Tensor, "batch seq width"]], sparse: slice
    ) -> Bool[Tensor, "batch #seq neurons"]:
        """Masks for the positions `sparse` of the activations at hand ([batch, 1, neurons]: the same for all).

        A prompt of sink tokens alone shows nothing to choose from: everything is kept.
        """
        if isinstance(self.gate, FixedGate):
            a = values[SiteKind.NEURON]
            return self.gate.mask.to(a.device).expand(a.shape[0], 1, -1)
        if isinstance(self.gate, PrefillGate):
            a = values[SiteKind.NEURON]
            return self.chosen()[:, None, :] if self.ready else torch.ones_like(a[:, :1], dtype=torch.bool)
        return self.gate.keep(values[self.gate.site][:, sparse])

    def chosen(self) -> Bool[Tensor, "batch neurons"]:
        """The masks that the prompts chose; decided once."""
        assert isinstance(self.gate, PrefillGate)
        if self._chosen is None:
            rule = self.gate.rule
            self._chosen = torch.stack([rule(statistic.value()) for statistic in self._statistics])
        return self._chosen

    @property
    def ready(self) -> bool:
        """Whether the prompt showed anything to choose from."""
        return not isinstance(self.gate, PrefillGate) or (bool(self._seen) and min(self._seen) > 0)
