"""The decode step of a model's own forward over a static cache, captured in one CUDA graph (tier 2 on a GPU).

A graph reads and writes the tensors that it was captured with: one cache is kept for it and filled again for every
prompt, and sliced projections keep their buffers. Sliding windows count their tokens on the host: not captured.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from actsparse.engine.cuda.graph import Captured, capture
from actsparse.engine.decode import step


def why_not_captured(model: PreTrainedModel, cache: Cache) -> str | None:
    """Why decode steps over this cache cannot be captured in a CUDA graph; None where they can."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return "the model is not on one CUDA device"
    if not isinstance(cache, StaticCache):
        return f"the family {model.config.model_type} has no static cache"
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return "a sliding window counts its tokens on the host"
    return None


def refill(target: Cache, source: Cache) -> None:
    """Makes `target`'s tensors, which stay where they are, those of `source`; both static, of one size."""
    for one, other in zip(target.layers, source.layers, strict=True):
        assert isinstance(one, StaticLayer)
        assert isinstance(other, StaticLayer)
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
            assert mine is not None
            assert theirs is not None
            mine.copy_(theirs)
        one.cumulative_length.copy_(other.cumulative_length)


@dataclass(slots=True)
class GraphedSteps:
    """Steps of a model over one cache: a graph for each kind of step, key[0], in the version that was asked last."""

    model: PreTrainedModel
    cache: Cache
    warnings: list[str] = field(default_factory=list)
    _token: Int[Tensor, "1 1"] = field(init=False)
    _position: Int[Tensor, "1 1"] = field(init=False)
    _captured: dict[tuple[int, ...], tuple[Captured, list[Tensor]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = torch.zeros_like(self._token)

    def ready(self, key: tuple[int, ...], start: int) -> None:
        """Capture the step that `key` names, if it is new; writes two positions of the cache from `start` on."""
        if key in self._captured:
            return
        self._position.fill_(start)
        logits: list[Tensor] = []

        def work() -> None:
            logits[:] = [step(self.model, self._token, self._position, self.cache)]

        found = capture(work)
        if found.warning is not None and found.warning not in self.warnings:
            self.warnings.append(found.warning)
        # Those of the same kind, key[0], read buffers that are gone.
        self._captured = {one: kept for one, kept in self._captured.items() if one[0] != key[0]}
        self._captured[key] = found, logits

    def kind(self, key: tuple[int, ...]) -> str:
        """How the step that `key` names runs: "graph" or "eager"."""
        return self._captured[key][0].kind if key in self._captured else "eager"

    def __call__(
        self, key: tuple[int, ...], token: Int[Tensor, "1 1"], position: Int[Tensor, "1 1"]
    ) -> Float[Tensor, "1 vocab"]:
        """Feed one token; the logits of the next, valid until the next step."""
        if self.kind(key) == "eager":
            return step(self.model, token, position, self.cache)
        captured, logits = self._captured[key]
        self._token.copy_(token)
        self._position.copy_(position)
        captured.run()
        return logits[0]
