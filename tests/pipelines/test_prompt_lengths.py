"""The kept share by length of the prompt, against a plan that is run at each length."""

import pytest
import torch
from tiny import LAYERS, make_tokenizer, words

from actsparse.data.sequences import blocks_of
from actsparse.engine.masked import MaskedPlan, probed
from actsparse.errors import DataError
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.prompt_lengths import kept_by_prompt_length

BLOCK, PROMPT, SINK = 48, 24, 4
LENGTHS = (8, 16, 24, 40)


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def blocks():
    return blocks_of(
        words(400, seed=3), make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="quality"
    )


def gates(text, loaded, blocks):
    calibration = of_blocks(loaded, blocks, PROMPT, Silent())
    return fit_plan(parse(text), calibration, loaded.record.step, gated=True)[0].gates()


@pytest.mark.parametrize("text", ["tda@0.5", "tda:length_aware=true@0.5", "tda:source=gate@0.5", "griffin@0.25"])
def test_the_share_is_that_of_a_run_with_such_prompts(text, loaded, blocks) -> None:
    plan = gates(text, loaded, blocks)
    found = kept_by_prompt_length(loaded, plan, blocks, Silent(), LENGTHS)
    for length in LENGTHS:
        for index, ids in enumerate(blocks.ids[:3]):
            probe = MaskedPlan(plan, prompt_length=length, sink_tokens=SINK)
            with probed(loaded.sites, [probe]), torch.no_grad():
                loaded.model(input_ids=ids[None], use_cache=False)
            assert found[length][:, index].tolist() == pytest.approx(probe.kept_frac())


def test_a_length_aware_threshold_drifts_less(loaded, blocks) -> None:
    drift = {}
    for text in ("tda@0.5", "tda:length_aware=true@0.5"):
        found = kept_by_prompt_length(loaded, gates(text, loaded, blocks), blocks, Silent(), (20, 40))
        drift[text] = max(abs(float(one.mean()) - 0.5) for one in found.values())
    assert drift["tda:length_aware=true@0.5"] < drift["tda@0.5"]
    assert drift["tda:length_aware=true@0.5"] < 0.02


def test_prompts_longer_than_blocks_are_refused(loaded, blocks) -> None:
    with pytest.raises(DataError, match="blocks of 48 tokens hold no prompt of 512"):
        kept_by_prompt_length(loaded, gates("griffin@0.5", loaded, blocks), blocks, Silent())
    assert len(gates("griffin@0.5", loaded, blocks)) == LAYERS
