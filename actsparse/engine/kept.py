"""The neurons that a plan keeps for its prompts: listed, or copied where enough tokens follow to repay it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from actsparse.engine.clock import seconds
from actsparse.engine.gating import GateState
from actsparse.engine.step.copies import PAYS, gather, lists_alone, union_density
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import SlicedPlan
from actsparse.engine.step.translate import Translator, choose_all
from actsparse.engine.step.work import GatePlan, Listed
from actsparse.errors import is_out_of_memory
from actsparse.methods.gates import FixedGate

PAIRS = 5
FEWEST = 32  # tokens that must follow before the measurement, of 2 * PAIRS steps, is worth its time
NO_COPIES = "there is no memory for copies of the neurons kept: they are read through lists"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Seconds that copying takes, and that a token takes through lists and from copies: medians."""

    copying: float
    listed: float
    copied: float

    @property
    def tokens(self) -> float:
        """Decoded tokens after which copies are repaid; infinite where they save nothing."""
        return self.copying / (self.listed - self.copied) if self.listed > self.copied else inf


class KeptNeurons:
    """Fills the lists of `plan` after prompts, and says what a decoder is to run: those lists, or copies of what they
    name.

    A single sequence on a CPU reads copies faster than scattered rows, to the same bits, so it takes copies where the
    tokens to come repay them by a measurement of this very plan; compiled kernels on CUDA read both equally fast. A
    batch on CUDA takes copies, since no kernel there reads the lists of several sequences.
    """

    def __init__(self, plan: GatePlan, translator: Translator, decoder: Decoder, *, chooses_again: bool) -> None:
        self.plan = plan
        self.warnings: list[str] = []
        self.break_even: BreakEven | None = None
        self._translator = translator
        self._decoder = decoder
        self._copies: SlicedPlan | None = None
        self._copied = False  # whether the copies are those of the prompts listed last
        on_cuda, batch = translator.weights.device.type == "cuda", decoder.state.batch
        alone = lists_alone(plan) and not chooses_again
        self._unites = on_cuda and batch > 1 and lists_alone(plan)
        self._may_copy = alone and batch == 1 and not on_cuda

    @property
    def work(self) -> GatePlan | SlicedPlan:
        """What a decoder is to run."""
        return self._copies if self._copied and self._copies is not None else self.plan

    @property
    def repaid_after(self) -> float | None:
        """Decoded tokens after which copies are made; None where nothing was measured."""
        return None if self.break_even is None else max(FEWEST - 1, self.break_even.tokens)

    @property
    def told(self) -> str | None:
        """How the kept neurons are read, where there was a choice."""
        after = self.repaid_after
        if after is None:
            return None
        repaid = "copies would never be repaid" if after == inf else f"copies are repaid after {after:.0f} tokens"
        return f"kept neurons {'copied' if self._copied else 'by list'}: {repaid}"

    def choose(self, states: Sequence[GateState | None]) -> None:
        """List the neurons that the gates of each layer keep; no decision waits for the device but that of a batch."""
        batch, neurons = self._decoder.state.batch, self._translator.weights.shape.neurons
        masks = {
            layer: _masks(state, batch, neurons)
            for layer, (work, state) in enumerate(zip(self.plan.layers, states, strict=True))
            if isinstance(work.mlp, Listed) and state is not None
        }
        choose_all(self.plan, masks)
        self._copied = False
        if self._unites:
            self._unite()

    def copy_if_repaid(self, tokens: int, start: Callable[[], None]) -> bool:
        """Copy the listed neurons where `tokens` decoded ones repay it; whether `work` is another now.

        The first call that matters measures, by steps from where `start` brings the decoder; it stands there then.
        """
        if not self._may_copy or self._copied or tokens < FEWEST:
            return False
        try:
            if self.break_even is None:
                self.break_even = self._measured(start)
            if tokens > self.break_even.tokens:
                self._copy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._may_copy, self._copies, self._copied = False, None, False
            self._decoder.set_plan(cast(Any, self.plan))
            start()
            self._say(NO_COPIES)
        return self._copied

    def shares(self) -> list[float]:
        """The share of each layer's neurons that the lists name."""
        assert self.plan.selection is not None
        return (self.plan.selection.count.double() / self.plan.selection.index.shape[1]).tolist()

    def _copy(self) -> None:
        before = self._copies
        self._copies, self._copied = gather(self.plan, self._translator, before), True
        if before is not None and before is not self._copies:
            self._decoder.forget_plan(before)

    def _unite(self) -> None:
        """Gather what any sequence keeps; where that is nearly everything it cannot pay, and is said."""
        density = union_density(self.plan)
        self._copy()
        if density > PAYS:
            self._say(f"the batch keeps {density:.0%} of the neurons in all: this plan is no faster than dense")

    def _measured(self, start: Callable[[], None]) -> BreakEven:
        """Copying and a step of each kind, in turns."""
        device = self._translator.weights.device
        copying, listed, copied = [], [], []
        for _ in range(PAIRS + 1):
            copying.append(seconds(device, self._copy))
            for work, laps in ((self.plan, listed), (self.work, copied)):
                self._decoder.set_plan(cast(Any, work))
                start()
                laps.append(seconds(device, lambda: self._decoder.decode(1)))
        self._copied = False
        self._decoder.set_plan(cast(Any, self.plan))
        start()
        medians = (float(torch.tensor(laps[1:]).quantile(0.5)) for laps in (copying, listed, copied))
        return BreakEven(**dict(zip(("copying", "listed", "copied"), medians, strict=True)))

    def _say(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _masks(state: GateState, batch: int, neurons: int) -> Bool[Tensor, "batch neurons"]:
    """The masks of a gate that has seen the prompts; a prompt that showed nothing to choose from keeps everything."""
    if isinstance(state.gate, FixedGate):
        return state.gate.mask.expand(batch, -1)
    return state.chosen() if state.ready else torch.ones(batch, neurons, dtype=torch.bool)
