"""lm-eval's tasks through a plan: a model class of lm-eval that runs contexts dense and continuations sparse.

lm-eval comes with the extra `actsparse[eval]`; this module is imported only where it is used.
`lm_eval --model actsparse --model_args pretrained=...,plan=...` finds the class as well (see docs/evaluation.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from actsparse.data.tasks import parse_dense_upto
from actsparse.data.texts import TextReader
from actsparse.engine.generation import sparse_generation
from actsparse.errors import DataError, ModelError, PlanError
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.continuations import Continuations
from actsparse.pipelines.plans import build, check_names, needs_text
from actsparse.pipelines.progress import Silent
from actsparse.specs import DataSpec, ModelSpec

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


# lm-eval's own decorators hide the class from type checkers
Base: Any = HFLM


class PlanLM(Base):
    """lm-eval's own `hf` model under a plan (None: dense, which is `hf` to the bit).

    Log-likelihoods: the context is the dense prompt, the continuation runs teacher-forced through the plan. Generation:
    prompts dense, decoded tokens sparse. `counts` says of every request (by its texts) how many tokens were predicted,
    and how many of them from a sparse position.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Plan | None,
        *,
        sink_tokens: int = 4,
        back: int = 0,
        batch_size: int = 1,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            max_length=max_length or loaded.record.max_positions,
        )
        self.plan = plan
        self.sink_tokens = sink_tokens
        gates = None if plan is None else plan.gates()
        self.scorer = Continuations(loaded, gates, sink_tokens, back, max_length)
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.plan is None:
            self.counts |= {key: (len(tokens), 0) for key, _, tokens in requests if key is not None}
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, Answer] = {}
        last: tuple[tuple[int, ...], torch.Tensor, int] | None = None
        # requests that differ in their last token alone share one pass
        for place in sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2])):
            key, context, continuation = requests[place]
            inputs = (len(context), *context, *continuation[:-1])
            if last is None or last[0] != inputs:
                found = self.scorer.log_probs(context, continuation)
                last = (inputs, found.log_probs, found.sparse)
            _, log_probs, sparse = last
            answers[place] = _answer(log_probs, continuation)
            if key is not None:
                self.counts[key] = (len(log_probs), sparse)
                self.cache_hook.add_partial("loglikelihood", key, answers[place])
        return [answers[place] for place in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._sparse():
            texts = super().generate_until(requests, disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            tokens = len(self.tok_encode(text, add_special_tokens=False))
            self.counts[request.args[0], ""] = (tokens, 0 if self.plan is None else max(0, tokens - 1))
        return texts

    def counted(self, arguments: Sequence[Any]) -> tuple[int, int]:
        """The tokens predicted for the requests with these arguments, and those of them from a sparse position."""
        keys = [(args[0], args[1] if len(args) > 1 and isinstance(args[1], str) else "") for args in arguments]
        found = [self.counts.get(key, (0, 0)) for key in keys]
        return sum(scored for scored, _ in found), sum(sparse for _, sparse in found)

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        with (
            nullcontext()
            if self.plan is None
            else sparse_generation(self.scorer.loaded.sites, self.plan.gates(), sink_tokens=self.sink_tokens)
        ):
            yield


@register_model("actsparse")
class ActsparseLM(PlanLM):
    """`lm_eval --model actsparse --model_args pretrained=NAME,plan=SHORT-FORM-OR-DIRECTORY`.

    `pretrained` is what `--model` takes; `plan` defaults to `dense`, and separates its options by `;` where lm-eval
    would cut at a comma (`plan=static:stat=griffin@0.5`, `plan=tda:source=n;first=32@0.5`). `calib` is the text that it
    is fitted on (default: the sample prompts), `dense_upto` is P or P-1.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str = DENSE,
        *,
        calib: str | None = None,
        dense_upto: str = "P",
        sink_tokens: int | str = 4,
        device: str | None = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | str | None = None,
        max_length: int | str | None = None,
    ) -> None:
        del max_batch_size
        if not str(batch_size or 1).isdigit():
            raise ModelError(f"batch_size={batch_size} is not supported by the model 'actsparse'", "give a number")
        sink = int(sink_tokens)
        loaded = load(ModelSpec(name=pretrained, revision=revision, dtype=dtype, device=_device(device)))
        fitted = None if plan == DENSE else _fitted(loaded, plan.replace(";", ","), calib, sink)
        length = None if max_length is None else int(max_length)
        back = parse_dense_upto(dense_upto)
        super().__init__(
            loaded, fitted, sink_tokens=sink, back=back, batch_size=int(batch_size or 1), max_length=length
        )


def _device(asked: str | None) -> str:
    """lm-eval asks for cuda:0 on machines that have none: there it means the CPU, as for its own `hf` model."""
    return asked if asked and (torch.cuda.is_available() or not asked.startswith("cuda")) else "auto"


def _answer(log_probs: torch.Tensor, continuation: list[int]) -> Answer:
    """The sum of log-likelihoods of a continuation, and whether greedy decoding would have written it."""
    targets = torch.tensor(continuation[-len(log_probs) :], device=log_probs.device)
    total = float(log_probs.gather(1, targets[:, None]).double().sum())
    return total, bool((log_probs.argmax(dim=-1) == targets).all())


def _fitted(loaded: LoadedModel, name: str, calib: str | None, sink_tokens: int) -> Plan:
    """One plan, read or fitted; raises PlanError where a control would need several runs."""
    names = check_names((name,))
    progress = Silent()
    spec = DataSpec(calib=calib, sink_tokens=sink_tokens)
    reader = TextReader(spec, loaded.tokenizer, loaded.record.max_positions, progress.note)
    texts = reader.eval_texts(fitted=needs_text(names) or not Path(name).expanduser().is_dir())
    calibration = of_blocks(loaded, texts.calibration, texts.prompt_length, progress)
    group = build(names, loaded, calibration, loaded.record.step)[0]
    if len(group.replicas) > 1:
        raise PlanError(f"{name} is the mean of {len(group.replicas)} seeds", f"name one: {_seeded(name)}")
    return group.plan


def _seeded(name: str) -> str:
    method, at, amount = name.partition("@")
    return f"{method}{',' if ':' in method else ':'}seed=0{at}{amount}"


@cache
def _manager(include_path: str | None) -> TaskManager:
    return TaskManager(include_path=include_path)


def check_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """lm-eval's task manager, with every name known; raises DataError with the nearest names otherwise."""
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise DataError(f"there is no folder {include_path}", "check the path given with --include-path")
    manager = _manager(None if include_path is None else str(Path(include_path).expanduser()))
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "list them with: lm_eval ls tasks"
            raise DataError(f"lm-eval has no task '{name}'", hint)
    return manager
