"""Where a model that others drive stands: which gates have seen what, and whether the pass at work is decode."""

from collections.abc import Sequence

from torch import Tensor

from actsparse.engine.gating import PlanState, SiteValues
from actsparse.engine.points import Replaced
from actsparse.methods.gates import LayerGates
from actsparse.models.taps import ForwardPass
from actsparse.results import Unit

WHOLE_PROMPT = 2**31


class Phases:
    """Follows the forward passes of a model: which gates have seen what, and whether the pass at work is decode."""

    def __init__(self, gates: Sequence[LayerGates], sink_tokens: int) -> None:
        self.gates = list(gates)
        self.sink_tokens = sink_tokens
        self.at_work = ForwardPass(batch=1, tokens=1, past=0, padding=())
        self.state = PlanState(gates, prompt_length=WHOLE_PROMPT, sink_tokens=sink_tokens)
        self.decoded = False
        self.ever_decoded = False
        self.passes = 0

    def begin(self, forward: ForwardPass) -> None:
        """Note a pass that is about to run."""
        self.at_work = forward
        self.passes += 1
        self.ever_decoded |= self.decoding
        if forward.past == 0:
            self.decoded = False
            self.state = PlanState(self.gates, prompt_length=WHOLE_PROMPT, sink_tokens=self.sink_tokens)

    @property
    def decoding(self) -> bool:
        """Whether the pass at work decodes one token after a prompt."""
        return self.at_work.past > 0 and self.at_work.tokens == 1

    def observe(self, layer: int, values: SiteValues) -> None:
        """See a prompt's activations; what is fed after the first decoded token changes no mask."""
        if not self.decoding and not self.decoded:
            self.state.observe(layer, values, self.at_work.past, self.at_work.padding)

    def edited(self, unit: Unit, layer: int, x: Tensor, values: SiteValues) -> Replaced | None:
        """The input of a projection under the plan: as it is in a prompt, edited for a decoded token."""
        if unit is Unit.NEURON:
            self.observe(layer, values)
        if not self.decoding:
            return None
        self.decoded = True
        edit = self.state.edit(unit, layer, x, values, slice(0, None))
        return None if edit is None else Replaced(edit.kept, edit.added(x))
