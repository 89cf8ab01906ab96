"""Decode is step-exact: teacher-forced token by token on a cache gives what one masked pass over the text gives."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tiny import make_model, words
from torch import Tensor

from actsparse.data.sequences import blocks_of
from actsparse.engine.decode import forced, new_cache, prefill
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import resolve
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.progress import Silent

BLOCK, PROMPT, SINK = 64, 24, 4
SEQUENCE_LEVEL = ["griffin@0.5", "griffin:first=6@0.5", "tda@0.5", "static@0.5", "coreinfer@0.5", "random:seed=1@0.5"]
TOKEN_LEVEL = ["oracle-n@0.5", "cats@0.5", "chess@0.5", "countdown@0.5", "cett@0.5", "heads-oracle@0.5"]


@pytest.fixture(scope="module")
def fitted(tiny_loaded: Callable) -> Callable[[str], tuple[LoadedModel, Sequence[LayerGates], Tensor]]:
    """The tiny llama in float32, gates fitted on one text, and a block of another."""
    loaded = tiny_loaded("llama")

    def text(seed: int) -> object:
        return blocks_of(words(4 * BLOCK, seed), loaded.tokenizer, block_length=BLOCK, prompt_length=PROMPT, source="t",
                         role="quality", sink_tokens=SINK)  # fmt: skip

    def gates(name: str) -> tuple[LoadedModel, Sequence[LayerGates], Tensor]:
        calibration = of_blocks(loaded, text(3), PROMPT, Silent())  # pyright: ignore[reportArgumentType]
        plan = fit_plan(parse(name), calibration, loaded.record.step, gated=True)[0]
        return loaded, plan.gates(), text(4).ids[0]  # pyright: ignore[reportAttributeAccessIssue]

    return gates


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def both_ways(loaded: LoadedModel, gates: Sequence[LayerGates], ids: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of tokens P+1..S-1 in one pass, and token by token on a cache of its own."""
    model, targets = loaded.model, ids[PROMPT + 1 :]
    with masked(loaded.sites, MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)), torch.no_grad():
        whole = model(input_ids=ids[None, :-1], use_cache=False).logits[0, PROMPT:]
    with masked(loaded.sites, MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)):
        cache = new_cache(model, BLOCK)
        prefill(model, ids[None, :PROMPT], cache)
        steps = forced(model, ids[None, PROMPT:-1], cache, PROMPT)[0]
    return nll(whole, targets), nll(steps, targets)


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_sequence_level_plans_are_step_exact_in_float32(name: str, fitted: Callable) -> None:
    loaded, gates, ids = fitted(name)
    whole, steps = both_ways(loaded, gates, ids)
    assert torch.allclose(whole, steps, atol=1e-3)
    with torch.no_grad():
        dense = nll(loaded.model(input_ids=ids[None, :-1]).logits[0, PROMPT:], ids[PROMPT + 1 :])
    assert not torch.allclose(whole, dense, atol=1e-2)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_token_level_plans_are_step_exact_in_float64(name: str, fitted: Callable) -> None:
    loaded, gates, ids = fitted(name)
    model = copy.deepcopy(make_model("llama")).double()
    wide = replace(loaded, model=model, sites=resolve(model))
    whole, steps = both_ways(wide, gates, ids)
    assert whole.dtype == torch.float64
    assert torch.allclose(whole, steps, atol=1e-5)
    with torch.no_grad():
        dense = nll(model(input_ids=ids[None, :-1]).logits[0, PROMPT:], ids[PROMPT + 1 :])
    assert not torch.allclose(whole, dense, atol=1e-2)
