"""The engine on a trained model: likelihoods of real text, dense and under plans, are those of the masked path."""

import pytest
import torch
from torch import Tensor

from actsparse.data.texts import TextReader
from actsparse.engine.choose import Engines
from actsparse.engine.decode import forced, new_cache, prefill
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.methods.plan import fit_plan
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.calibration import of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.specs import DataSpec, ModelSpec

PROMPT, SCORED, SINK = 64, 32, 4


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(ModelSpec(name="demo", device="cpu"))


@pytest.fixture(scope="module")
def plans(loaded: LoadedModel) -> tuple[Tensor, dict[str, list[LayerGates]]]:
    """A block of text [1, tokens], and the gates of each plan fitted on another."""
    data = DataSpec(limit=1, block_length=PROMPT + SCORED + 1, prompt_length=PROMPT)
    texts = TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _text: None).eval_texts(fitted=True)
    calibration = of_blocks(loaded, texts.calibration, PROMPT, Silent())
    names = ("griffin@0.5", "static@0.3", "tda@0.4", "griffin:refresh_every=8@0.5")
    found = {name: fit_plan(parse(name), calibration, loaded.record.step, gated=True)[0].gates() for name in names}
    width = loaded.record.intermediate_size
    everything = FixedGate(torch.ones(width, dtype=torch.bool))
    return texts.quality.ids[0][None], {"dense": [LayerGates(neurons=everything)] * loaded.record.layers, **found}


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits[0].double().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def test_likelihoods_are_those_of_the_masked_path(
    loaded: LoadedModel, plans: tuple[Tensor, dict[str, list[LayerGates]]]
) -> None:
    ids, gates_of = plans
    prompt, fed, targets = ids[:, :PROMPT], ids[:, PROMPT:-1], ids[0, PROMPT + 1 :]
    engines, values = Engines(loaded.sites), {}
    for name, gates in gates_of.items():
        run = MaskedPlan(gates, prompt_length=PROMPT, sink_tokens=SINK)
        cache = new_cache(loaded.model, ids.shape[1])
        with masked(loaded.sites, run):
            prefill(loaded.model, prompt, cache)
            expected = nll(forced(loaded.model, fed, cache, PROMPT), targets)
        with engines.open(gates, sink_tokens=SINK, max_length=ids.shape[1] + 1) as engine:
            engine.prefill(prompt, watch=True)
            engine.select()
            engine.use(sparse=True)
            found = nll(engine.forced(fed), targets)
        assert float((found - expected).abs().max()) < 1e-3, name
        values[name] = float(found.mean())
    assert values["griffin@0.5"] > values["dense"] + 0.05, "the plan changed nothing"
    assert values["griffin:refresh_every=8@0.5"] != values["griffin@0.5"]
