"""The engine choice: from model, device, dtype and gates to the best way of decoding, each step down announced.

Tier 1: a step of our own (CPU operators, CUDA kernels). Tier 2: the model's own forward with a static cache. Tier 3:
the same, eager, where the model cannot have one. Tiers 2 and 3 run plans that choose neurons before the first token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actsparse.engine.forward import forward_run
from actsparse.engine.own import OwnRun
from actsparse.engine.own_steps import NO_ATOMICS, OwnSteps
from actsparse.engine.sparse import why_not_sliced
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.translate import NoStepError
from actsparse.errors import ModelError, PlanError, is_out_of_memory
from actsparse.methods.gates import LayerGates
from actsparse.models.families import FAMILIES
from actsparse.models.sites import ModelSites
from actsparse.results import Unit

OWN_DEVICES = ("cpu", "cuda")
NO_PACKING = "there is no memory for a packed copy of the weights"
NO_COPIES = "there is no memory for the copies of weights, or the cache, that its step needs"


class Run(Protocol):
    """Prompts and what follows them, dense and under one plan: `prefill`, `select`, `use`, then `rewind` and `feed`,
    `forced` or `generate`, in turns."""

    tier: int
    batch: int
    max_length: int
    warnings: list[str]

    @property
    def path(self) -> str:
        """How the step at work runs."""
        ...

    @property
    def announced(self) -> list[str]:
        """Which better path could not be taken, and why."""
        ...

    @property
    def watches(self) -> bool:
        """Whether masks depend on the prompt."""
        ...

    def prefill(
        self, ids: Int[Tensor, "batch seq"], *, watch: bool, padding: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Run prompts dense, watching what gates need; the logits of their last position."""
        ...

    def select(self, tokens: int | None = None) -> None:
        """Decide the masks of the prompts prefilled last, which `tokens` decoded ones follow (None: nobody knows)."""
        ...

    @property
    def reading(self) -> str | None:
        """How what a plan keeps is read, and the break-even measured; None where there was nothing to choose."""
        ...

    @property
    def break_even(self) -> float | None:
        """Decoded tokens after which copies of what a plan keeps are repaid; None where there was nothing to choose."""
        ...

    def use(self, *, sparse: bool) -> None:
        """Decode under the plan, or dense, from now on."""
        ...

    def rewind(self) -> None:
        """Back to the end of the prompts."""
        ...

    def feed(self, tokens: Int[Tensor, "batch count"]) -> None:
        """Process given tokens one by one, the first being the one after the prompt."""
        ...

    def begin(self, tokens: Int[Tensor, "batch count"]) -> None:
        """Make ready to process given tokens, one at each `advance`."""
        ...

    def advance(self) -> None:
        """Process the next of the given tokens."""
        ...

    def forced(self, tokens: Int[Tensor, "batch count"]) -> Float[Tensor, "batch count vocab"]:
        """The same, with the logits after each."""
        ...

    def chosen(
        self, tokens: Int[Tensor, "batch count"]
    ) -> tuple[Float[Tensor, "batch count vocab"], dict[tuple[Unit, int], Bool[Tensor, "batch count units"]]] | None:
        """The same under the plan, with what its rules chose for each token; None where an engine does not tell."""
        ...

    def generate(
        self, count: int, *, sampling: Sampling | None = None, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Up to `count` tokens a sequence after the prompt; each ends with the first stop token."""
        ...

    def kept(self) -> dict[tuple[str, int], float]:
        """The share of each unit of each layer that was read since `forget`; empty where it is not known."""
        ...

    def forget(self) -> None:
        """Count what is read from here on."""
        ...


def tier_of(family: str) -> int:
    """The best tier that a family of the table can have."""
    return FAMILIES[family].tier


class Engines:
    """What one model needs to decode fast, made when first needed and shared by all plans.

    `note` is told before anything is built. `share`, `fast_atomics`: see `OwnSteps`.
    """

    def __init__(
        self,
        sites: ModelSites,
        note: Callable[[str], None] = lambda _text: None,
        *,
        share: bool = True,
        fast_atomics: bool = False,
    ) -> None:
        self.sites = sites
        self.note = note
        self.share = share
        self.fast_atomics = fast_atomics

    @cached_property
    def own(self) -> OwnSteps | str:
        """The model's own steps, or why there are none."""
        model = self.sites.model
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            return "the model is spread over several devices"
        device = next(iter(devices)).type
        if device not in OWN_DEVICES:
            return f"there is no step of our own for the device {device}"
        if tier_of(self.sites.family.model_type) > 1:
            return f"the family {self.sites.family.model_type} has no step of its own"
        try:
            return OwnSteps(self.sites, self.note, share=self.share, fast_atomics=self.fast_atomics)
        except ModelError as error:
            return error.what
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return NO_PACKING

    @contextmanager
    def open(self, gates: Sequence[LayerGates], *, sink_tokens: int, max_length: int, batch: int = 1) -> Iterator[Run]:
        """The best run for these gates (none: dense alone); the model is as before when the block ends.

        Raises PlanError where no engine can run them, with the reason. Where memory does not suffice for a batch, which
        a smaller one may change, torch's own error is raised.
        """
        own, reason = self.own, None
        if isinstance(own, OwnSteps):
            try:
                run = OwnRun(own, gates, sink_tokens=sink_tokens, batch=batch, max_length=max_length)
            except NoStepError as error:
                reason = error.what
            except (RuntimeError, MemoryError) as error:
                if batch > 1 or not is_out_of_memory(error):
                    raise
                reason = NO_COPIES
            else:
                with torch.no_grad():
                    yield run
                return
        else:
            reason = own
        refused = why_not_sliced(gates) if gates else None
        if gates and self.sites.moe_layers:
            refused = refused or "experts are not sliced"
        if refused or batch > 1:
            what = refused or f"batches of {batch} need a step of our own"
            raise PlanError(f"no engine runs this plan: {what}; {reason}", "its masked run is exact, and never faster")
        tier = max(2, tier_of(self.sites.family.model_type))
        with forward_run(self.sites, gates, sink_tokens=sink_tokens, max_length=max_length, tier=tier) as run:
            run.warnings.append(f"decode runs through the model's own forward: {reason}")
            if self.fast_atomics:
                run.warnings.append(NO_ATOMICS)
            yield run
