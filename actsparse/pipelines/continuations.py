"""One text after another in the decode regime (methods.md, section 1): a dense context, and a continuation that is
teacher-forced through a plan. What local tasks and the lm-eval model share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import LayerGates
from actsparse.models.load import LoadedModel


@dataclass(frozen=True)
class Continuation:
    """Log-probabilities [tokens, vocab] that predict each token of a continuation, of which `sparse` were computed at a
    sparse position."""

    log_probs: Float[Tensor, "tokens vocab"]
    sparse: int


@dataclass(frozen=True)
class Continuations:
    """Scores continuations under the gates of a plan (None: dense).

    `back`: how many of the context's last tokens run sparse too (`--dense-upto P-1` is 1). A context of P tokens runs
    dense; its last position predicts the first token of the continuation, so with `back=0` that one is always dense.
    """

    loaded: LoadedModel
    gates: Sequence[LayerGates] | None
    sink_tokens: int = 4
    back: int = 0
    max_length: int | None = None

    @torch.no_grad()
    def log_probs(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """One forward pass over both; a text longer than the model's context loses its first tokens."""
        tokens = [*context, *continuation][:-1]
        limit = self.max_length or self.loaded.record.max_positions
        tokens = tokens if limit is None else tokens[-limit:]
        count = min(len(continuation), len(tokens))
        start = len(tokens) - count + 1
        dense = min(len(tokens), max(self.sink_tokens, start - self.back))
        ids = torch.tensor([tokens], device=self.loaded.device)
        with self._under(dense):
            output = self.loaded.model(input_ids=ids, use_cache=False, logits_to_keep=count)
        sparse = 0 if self.gates is None else min(count, len(tokens) - dense)
        return Continuation(output.logits[0].float().log_softmax(dim=-1), sparse)

    def _under(self, dense: int) -> AbstractContextManager[None]:
        if self.gates is None:
            return nullcontext()
        run = MaskedPlan(self.gates, prompt_length=dense, sink_tokens=self.sink_tokens)
        return masked(self.loaded.sites, run)
