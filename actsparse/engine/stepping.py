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
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from actsparse.engine import timing
from actsparse.engine.choose import NO_COPIES, NO_PACKING, Engines
from actsparse.engine.cuda.availability import native_failure
from actsparse.engine.own import OwnRun
from actsparse.engine.own_steps import OwnSteps
from actsparse.engine.phases import Phases
from actsparse.engine.step.translate import NoStepError
from actsparse.errors import is_out_of_memory
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


def own_steps(sites: ModelSites, gates: Sequence[LayerGates], *, fast_atomics: bool = False) -> OwnSteps | None:
    """The model's own steps, where it has some that are ready at once and can run these gates.

    They are ready at once on a CPU, and on a GPU whose compiled kernels take the model: others wait for torch.compile.
    Where memory does not suffice for the copies of weights that they need, a warning says so.
    """
    parameter = next(sites.model.parameters())
    if parameter.dtype not in READY.get(parameter.device.type, ()):
        return None
    if parameter.is_cuda and native_failure() is not None:
        return None
    own = Engines(sites, share=False, fast_atomics=fast_atomics).own
    if own == NO_PACKING:
        warnings.warn(f"decode runs through the model's own forward: {NO_PACKING}", stacklevel=5)
    if not isinstance(own, OwnSteps) or own.most_sequences == 0:
        return None
    try:
        own.translator.plan(gates, 1)
    except NoStepError:
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        warnings.warn(f"decode runs through the model's own forward: {NO_COPIES}", stacklevel=5)
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
        self._slower: dict[int, bool] = {}  # by batch size, where it was measured
        self._no_room: dict[int, int] = {}  # by batch size: positions that memory did not suffice for
        self._said: set[str] = set()
        self._whole = whole
        self._runs: dict[int, OwnRun] = {}
        self._run: OwnRun | None = None
        self._cache: DynamicCache | None = None
        # `generate` reads the signature to learn what a model takes
        self.__signature__ = inspect.signature(whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._decodes(args, kwargs):
            self._cache = None
            return self._whole(*args, **kwargs)
        ids: Any = kwargs.get("input_ids")
        cache: Any = kwargs.get("past_key_values")
        why = (
            "tokens must come by name" if args or not isinstance(ids, Tensor) else self._why_masked(ids, cache, kwargs)
        )
        if why is None:
            position, padding = int(cache.get_seq_length()), _padding(kwargs.get("attention_mask"))
            with torch.no_grad():
                why = self._follow(ids[:, 0], cache, position, padding)
                if why is None:
                    return self._step(ids[:, 0], cache, position, padding)
        self._cache = None
        self._say(f"masks are applied to the dense model: exact, and slower than dense ({why})")
        return self._whole(*args, **kwargs)

    def _decodes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a pass is one decoded token a sequence, after a prompt."""
        named = self.__signature__.bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, embedded, cache = (named.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        fed = embedded if ids is None else ids
        if not isinstance(cache, Cache) or not isinstance(fed, Tensor):
            return False
        return fed.shape[1] == 1 and int(cache.get_seq_length()) > 0

    def _why_masked(self, ids: Tensor, cache: Any, kwargs: dict[str, Any]) -> str | None:
        """Why a decode pass does not go through the step; None where it stands at the cache's end, asks for logits
        alone, and its cache and mask can be read."""
        steps, mask = self._steps, kwargs.get("attention_mask")
        asked = {name for name, value in kwargs.items() if value is not None and value is not False} - UNDERSTOOD
        if type(cache) is not DynamicCache:
            return f"its own step does not read a {type(cache).__name__}"
        if len(ids) > steps.most_sequences:
            return f"at batch {len(ids)}: its own step takes {steps.most_sequences} at once"
        if asked:
            return f"its own step knows no {', '.join(sorted(asked))}"
        if not _left_padded(mask):
            return "its own step takes masks that leave out padding in front, and no others"
        if not _at_the_end(int(cache.get_seq_length()), kwargs, "position_ids" in self.__signature__.parameters):
            return "the tokens do not stand where its own step puts them: at the cache's end, padding not counted"
        if not _plain(steps.sites.model.config, kwargs):
            return "its own step answers with logits and cache, by name"
        return None

    def _say(self, text: str) -> None:
        """Warn of it, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=5)

    def _step(self, tokens: Tensor, cache: DynamicCache, position: int, padding: Tensor | None) -> Any:
        """The answer to a pass of `tokens` [batch], their keys and values in the caller's cache."""
        run, left = self._run, () if padding is None else tuple(padding.tolist())
        assert run is not None, "a run follows the cache"
        self._phases.begin(ForwardPass(batch=len(tokens), tokens=1, past=position, padding=left))
        self._phases.decoded = True
        logits = run.step(tokens, position)
        for layer in range(self._steps.weights.shape.layers):
            keys, values = run.written(layer, position)
            cache.update(keys.clone(), values.clone(), layer)
        logits = logits[:, None].to(self._steps.weights.dtype, copy=True)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]

    def _follow(self, tokens: Tensor, cache: DynamicCache, position: int, padding: Tensor | None) -> str | None:
        """Let a run stand at the end of the caller's cache; why none can, where memory does not suffice."""
        batch = len(tokens)
        if self._follows(cache, batch, position):
            return None
        followed = self._run.followed if self._run is not None and self._cache is cache else 0
        room = max(GROWTH, position) + position
        known = self._runs.get(batch)
        if known is not None and position + 1 < known.max_length:
            room = known.max_length
        if room >= self._no_room.get(batch, room + 1):
            return NO_COPIES
        try:
            run = self._run_for(batch, room)
            run.adopt(cache, self._phases.state, padding)
            if batch not in self._slower:
                run.select()
                self._slower[batch] = self._measured(run, tokens, position)
            run.resume(followed)
            run.use(sparse=self._when_slower == "sparse" or not self._slower[batch])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._runs.pop(batch, None)
            self._run, self._no_room[batch] = None, room
            return NO_COPIES
        for text in run.announced:
            self._say(text)
        self._run, self._cache = run, cache
        return None

    def _run_for(self, batch: int, room: int) -> OwnRun:
        """A run of this batch size with that much room: the last one, whose steps are ready, if it is such a one."""
        run = self._runs.get(batch)
        if run is None or run.max_length != room:
            self._runs.pop(batch, None)
            measured = run.measured if run is not None else None
            self._run = run = None  # so that its memory is there for the next
            run = OwnRun(
                self._steps, self._phases.gates, sink_tokens=0, batch=batch, max_length=room, measured=measured
            )
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
            self._say(f"this plan {said} at batch {len(tokens)}: {found.text}; decode goes on {onward}")
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
