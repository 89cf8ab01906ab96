"""Decode passes of a model that others drive (`generate`, a harness, a loop), run by a step of our own.

The model's forward is stood in for while the block runs: a pass of one token after a prompt goes through the step and
leaves its keys and values in the caller's cache; every other pass, and one that asks for more than logits, goes on.
The first step at each batch size is a probe too: whether the plan is faster than dense is measured, and said.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from actsparse.engine import timing
from actsparse.engine.choose import Engines
from actsparse.engine.cuda.availability import native_failure
from actsparse.engine.own import OwnRun, OwnSteps
from actsparse.engine.phases import Phases
from actsparse.engine.step.translate import NoStepError
from actsparse.methods.gates import LayerGates
from actsparse.models.sites import ModelSites
from actsparse.models.taps import ForwardPass

Decode = Literal["sparse", "dense"]
READY = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
GROWTH = 256  # positions of room behind a prompt; doubled when they are used up
UNDERSTOOD = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "return_dict",
     "logits_to_keep"}
)  # fmt: skip


def own_steps(sites: ModelSites, gates: Sequence[LayerGates]) -> OwnSteps | None:
    """The model's own steps, where it has some that are ready at once and can run these gates.

    They are ready at once on a CPU, and on a GPU whose compiled kernels take the model: others wait for torch.compile.
    """
    parameter = next(sites.model.parameters())
    if parameter.dtype not in READY.get(parameter.device.type, ()):
        return None
    if parameter.is_cuda and native_failure() is not None:
        return None
    own = Engines(sites, share=False).own
    if not isinstance(own, OwnSteps) or own.most_sequences == 0:
        return None
    try:
        own.translator.plan(gates, 1)
    except NoStepError:
        return None
    return own


@contextmanager
def stepping(steps: OwnSteps, phases: Phases, when_slower: Decode) -> Iterator[None]:
    """Run decode passes of the model by its own steps while the block runs; then its forward is as before.

    `when_slower`: how to decode where the plan loses every pair of the probe; a warning says so where it is no faster.
    """
    model: Any = steps.sites.model
    known = model.__dict__.get("forward")
    model.forward = _Forward(steps, phases, when_slower, model.forward)
    try:
        yield
    finally:
        if known is None:
            del model.forward
        else:
            model.forward = known


class _Forward:
    """Stands in for a model's forward."""

    def __init__(self, steps: OwnSteps, phases: Phases, when_slower: Decode, whole: Callable[..., Any]) -> None:
        self._steps = steps
        self._phases = phases
        self._when_slower = when_slower
        self._slower: dict[int, bool] = {}
        self._whole = whole
        self._runs: dict[int, OwnRun] = {}
        self._run: OwnRun | None = None
        self._cache: DynamicCache | None = None
        # `generate` reads the signature to learn what a model takes
        self.__signature__ = inspect.signature(whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids: Any = kwargs.get("input_ids")
        cache: Any = kwargs.get("past_key_values")
        if args or not isinstance(ids, Tensor) or not self._decodes(ids, cache, kwargs):
            self._cache = None
            self._say_masked(ids, cache)
            return self._whole(*args, **kwargs)
        position = int(cache.get_seq_length())
        padding = _padding(kwargs.get("attention_mask"))
        left = () if padding is None else tuple(padding.tolist())
        self._phases.begin(ForwardPass(batch=len(ids), tokens=1, past=position, padding=left))
        with torch.no_grad():
            logits = self._step(ids[:, 0], cache, position, padding)
        for layer in range(self._steps.weights.shape.layers):
            assert self._run is not None
            keys, values = self._run.written(layer, position)
            cache.update(keys.clone(), values.clone(), layer)
        logits = logits[:, None].to(self._steps.weights.dtype, copy=True)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]

    def _decodes(self, ids: Tensor, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a pass is one decoded token a sequence, where the cache ends, for logits alone, and that cache can
        be read."""
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        return (
            type(cache) is DynamicCache
            and ids.shape[1] == 1
            and len(ids) <= self._steps.most_sequences
            and int(cache.get_seq_length()) > 0
            and asked <= UNDERSTOOD
            and _left_padded(kwargs.get("attention_mask"))
            and (self._steps.takes_padding or not _any_padding(kwargs.get("attention_mask")))
            and _at_the_end(int(cache.get_seq_length()), kwargs, "position_ids" in self.__signature__.parameters)
            and _plain(self._steps.sites.model.config, kwargs)
        )

    def _say_masked(self, ids: Any, cache: Any) -> None:
        """Warn once of decode passes of more sequences than the step takes."""
        most = self._steps.most_sequences
        if not isinstance(ids, Tensor) or not isinstance(cache, DynamicCache) or len(ids) <= most:
            return
        if ids.shape[1] == 1 and int(cache.get_seq_length()) > 0 and len(ids) not in self._slower:
            self._slower[len(ids)] = True
            warnings.warn(
                f"masks are applied to the dense model at batch {len(ids)}: exact, and slower than dense (its own step "
                f"takes {most} at once)",
                stacklevel=4,
            )

    def _step(self, tokens: Tensor, cache: Any, position: int, padding: Tensor | None) -> Tensor:
        if not self._follows(cache, len(tokens), position):
            run = self._run_for(len(tokens), position)
            run.adopt(cache, self._phases.state, padding)
            if len(tokens) not in self._slower:
                run.select()
                self._slower[len(tokens)] = self._measured(run, tokens, position)
            run.resume()
            run.use(sparse=self._when_slower == "sparse" or not self._slower[len(tokens)])
            self._run, self._cache = run, cache
        assert self._run is not None
        self._phases.decoded = True
        return self._run.step(tokens, position)

    def _run_for(self, batch: int, position: int) -> OwnRun:
        """A run with room behind `position`: the last one of this batch size, whose steps are ready, if it has."""
        run = self._runs.get(batch)
        if run is None or position + 1 >= run.max_length:
            room = max(GROWTH, position) + position
            run = OwnRun(self._steps, self._phases.gates, sink_tokens=0, batch=batch, max_length=room)
            self._runs[batch] = run
        return run

    def _measured(self, run: OwnRun, tokens: Tensor, position: int) -> bool:
        """Whether the plan is clearly slower than dense at this batch size; what its gates then know is the probe's."""

        def ready(sparse: bool) -> None:
            run.use(sparse=sparse)
            run.rewind()

        model = self._steps.sites.model
        found = timing.probe_of(model, lambda _sparse: run.step(tokens, position), ready=ready, tokens=1)
        if not found.pays:
            said = "does not pay" if found.slower else "is not clearly faster or slower than dense"
            onward = self._when_slower if found.slower else "sparse"
            warnings.warn(
                f"this plan {said} at batch {len(tokens)}: {found.text}; decode goes on {onward}", stacklevel=2
            )
        return found.slower

    def _follows(self, cache: Any, batch: int, position: int) -> bool:
        """Whether our cache is the caller's: nothing was reordered, cropped or added since our last step."""
        run = self._run
        if run is None or self._cache is not cache or run.batch != batch or position + 1 >= run.max_length:
            return False
        last = self._steps.weights.shape.layers - 1
        keys, _ = run.written(last, position - 1)
        theirs = cache.layers[last].keys
        return theirs is not None and torch.equal(theirs[:, :, -1:], keys)


def _left_padded(mask: Any) -> bool:
    """Whether an attention mask only leaves out positions in front."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    seen = mask.long()
    return bool((seen.diff(dim=1) >= 0).all() and seen[:, -1].all())


def _at_the_end(position: int, kwargs: dict[str, Any], takes_positions: bool) -> bool:
    """Whether each token stands where the step puts it: at the end of the cache, less the padding in front."""
    given, cache_position = kwargs.get("position_ids"), kwargs.get("cache_position")
    if cache_position is not None and not bool((torch.as_tensor(cache_position) == position).all()):
        return False
    padding = _padding(kwargs.get("attention_mask"))
    if given is None:  # a model that takes positions then counts padding too
        return not takes_positions or not _any_padding(kwargs.get("attention_mask"))
    # a mask may lie on another device than the positions
    expected = position if padding is None else (position - padding)[:, None].to(given.device)
    return given.dim() == 2 and bool((given == expected).all())


def _plain(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a pass answers with logits and cache, by name."""
    by_name = kwargs.get("return_dict")
    more = config.output_hidden_states or config.output_attentions
    return (
        bool(config.return_dict if by_name is None else by_name) and not more and kwargs.get("use_cache") is not False
    )


def _any_padding(mask: Any) -> bool:
    padding = _padding(mask)
    return padding is not None and bool(padding.any())


def _padding(mask: Any) -> Tensor | None:
    """Positions of padding in front of each sequence [batch]."""
    return mask.long().argmax(dim=1) if isinstance(mask, Tensor) else None
