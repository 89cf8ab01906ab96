"""The neurons that a plan keeps for its prompts: listed, or copied where enough tokens follow to repay it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

import torch
from jaxtyping import Bool
from torch import Tensor

from actsparse.engine.clock import seconds
from actsparse.engine.gating import GateState
from actsparse.engine.step.copies import PAYS, capacity_of, gather, in_place, lists_alone, mask_all, room, union_density
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import SlicedPlan
from actsparse.engine.step.translate import Translator, choose_all
from actsparse.engine.step.work import GatePlan, Listed
from actsparse.errors import is_out_of_memory
from actsparse.methods.gates import FixedGate

PAIRS = 3
FEWEST = 32  # tokens that must follow before the measurement, of the time of some 14 steps, is worth it
LISTS_STAY = "there is no memory for copies of the neurons kept: they are read through lists"
NO_GAIN = f"the batch keeps over {PAYS:.0%} of the neurons in all: all are read, and this plan is no faster than dense"


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
    tokens to come repay them by a measurement of this very plan (`break_even` where that was done before); compiled
    kernels on CUDA read both equally fast. A batch on CUDA takes copies of its union, or everything in place where the
    union is nearly that: no kernel there reads the lists of several sequences.
    """

    def __init__(
        self,
        plan: GatePlan,
        translator: Translator,
        decoder: Decoder,
        *,
        chooses_again: bool,
        break_even: BreakEven | None = None,
    ) -> None:
        self.plan = plan
        self.work: GatePlan | SlicedPlan = plan
        """What a decoder is to run."""
        self.warnings: list[str] = []
        self.break_even = break_even
        self._translator = translator
        self._decoder = decoder
        self._copies: SlicedPlan | None = None
        self._everything: SlicedPlan | None = None
        self._fixed = False  # whether masks hold whatever the prompt, and are listed
        on_cuda, batch, alone = translator.weights.device.type == "cuda", decoder.state.batch, lists_alone(plan)
        self._unites = alone and on_cuda and batch > 1
        self._may_copy = alone and not on_cuda and batch == 1 and not chooses_again

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
        return f"kept neurons {'by list' if self.work is self.plan else 'copied'}: {repaid}"

    def choose(self, states: Sequence[GateState | None], *, again: bool = False) -> None:
        """List the neurons that the gates of each layer keep; no decision waits for the device but that of a batch.

        `again`: in the middle of a text, whose steps are ready; buffers that are large enough then stay.
        """
        if self._fixed:
            return
        batch, neurons = self._decoder.state.batch, self._translator.weights.shape.neurons
        masks = {
            layer: _masks(state, batch, neurons)
            for layer, (work, state) in enumerate(zip(self.plan.layers, states, strict=True))
            if isinstance(work.mlp, Listed) and state is not None
        }
        choose_all(self.plan, masks)
        self._fixed = all(state is None or isinstance(state.gate, FixedGate) for state in states)
        self.work = self.plan
        if self._unites:
            self._unite(again)

    def copy_if_repaid(self, tokens: int, start: Callable[[], None]) -> bool:
        """Copy the listed neurons where `tokens` decoded ones repay it; whether `work` is another now.

        The first call that matters measures, by steps from where `start` brings the decoder; it stands there then.
        """
        if not self._may_copy or self.work is not self.plan or tokens < FEWEST:
            return False
        try:
            if self.break_even is None:
                self.break_even = self._measured(start)
            if tokens > self.break_even.tokens:
                self._copy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._drop_copies()
            self._may_copy, self.break_even = False, None
            self._decoder.set_plan(self.plan)
            start()
            self._say(LISTS_STAY)
        return self.work is not self.plan

    def shares(self) -> list[float]:
        """The share of each layer's neurons that are read."""
        assert self.plan.selection is not None
        if self.work is self._everything:
            return [1.0] * len(self.plan.layers)
        return (self.plan.selection.count.double() / self.plan.selection.index.shape[1]).tolist()

    def _copy(self, *, spacious: bool = False) -> None:
        """Gather what is listed: into buffers of just its size or, `spacious`, into those that hold it."""
        needed = capacity_of(self.plan)
        held = 0 if self._copies is None else self._copies.down.shape[1]
        if held < needed or (held > needed and not spacious):
            self._drop_copies()  # before the next are there
        if self._copies is None:
            self._copies = room(self.plan, self._translator, needed)
        gather(self.plan, self._translator, self._copies)
        self.work = self._copies

    def _drop_copies(self) -> None:
        if self._copies is not None:
            self._decoder.forget_plan(self._copies)
        self._copies, self.work = None, self.plan

    def _unite(self, again: bool) -> None:
        """Gather what any sequence keeps, where that is little enough to pay; else let all be read in place."""
        if union_density(self.plan) <= PAYS:
            self._copy(spacious=again)
            return
        self._drop_copies()
        self._everything = self._everything or in_place(self.plan, self._translator)
        mask_all(self.plan, self._everything)
        self.work = self._everything
        self._say(NO_GAIN)

    def _measured(self, start: Callable[[], None]) -> BreakEven:
        """Copying, and a step of each kind in turns, after one of each."""
        device = self._translator.weights.device
        self._copy()
        copying = seconds(device, self._copy)
        listed, copied = [], []
        for _ in range(PAIRS + 1):
            for work, laps in ((self.plan, listed), (self.work, copied)):
                self._decoder.set_plan(work)
                start()
                laps.append(seconds(device, lambda: self._decoder.decode(1)))
        self.work = self.plan
        self._decoder.set_plan(self.plan)
        start()
        return BreakEven(copying=copying, listed=median(listed[1:]), copied=median(copied[1:]))

    def _say(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _masks(state: GateState, batch: int, neurons: int) -> Bool[Tensor, "batch neurons"]:
    """The masks of a gate that has seen the prompts; a prompt that showed nothing to choose from keeps everything."""
    if isinstance(state.gate, FixedGate):
        return state.gate.mask.expand(batch, -1)
    return state.chosen() if state.ready else torch.ones(batch, neurons, dtype=torch.bool)
