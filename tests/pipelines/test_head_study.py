"""Head sparsity and KV curves on a tiny model, against what the parts say."""

from collections.abc import Callable

import pytest
import torch
from tiny import HEADS, LAYERS, make_tokenizer, words

from actsparse.data.sequences import Sequences, blocks_of
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.head_study import head_runs, head_sparsity, kv_curves
from actsparse.pipelines.progress import Silent
from actsparse.results import KvPolicy, SiteKind

PROMPT, BLOCK = 8, 28


@pytest.fixture(scope="module")
def loaded(tiny_loaded: Callable) -> LoadedModel:
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def blocks() -> Sequences:
    return blocks_of(
        words(90, seed=3), make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="calibration"
    )


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel, blocks: Sequences) -> TextCalibration:
    return of_blocks(loaded, blocks, PROMPT, Silent())


@pytest.mark.parametrize("unit", ["head", "group"])
def test_head_sparsity_keeps_the_error_that_it_names(unit: str, loaded: LoadedModel, blocks: Sequences) -> None:
    found = head_sparsity(loaded, blocks, Silent(), target=0.3, unit=unit)  # pyright: ignore[reportArgumentType]
    assert [one.layer for one in found] == list(range(LAYERS))
    outputs: list[torch.Tensor] = []
    with tapped(loaded.sites, {SiteKind.ATTN_OUT: lambda _s, x: outputs.append(x[0])}, (1,)), torch.no_grad():
        for ids in blocks.ids:
            loaded.model(input_ids=ids[None], use_cache=False)
    sink = blocks.record.sink_tokens
    matrix = loaded.sites.layers[1].output.get_parameter("weight")
    units = HEADS if unit == "head" else 2
    ratios, shares = [], []
    for o in torch.cat([one[sink:] for one in outputs]):
        width = len(o) // units
        added = torch.stack(
            [matrix[:, i * width : (i + 1) * width] @ o[i * width : (i + 1) * width] for i in range(units)]
        )
        # the threshold ends just under the norm of some head: rounding must not decide on which side
        small = added.norm(dim=1) < found[1].eps * (1 - 1e-5)
        ratios.append(float(added[small].sum(dim=0).norm() / added.sum(dim=0).norm()))
        shares.append(float(small.float().mean()))
    assert found[1].tokens == len(ratios)
    assert found[1].cett == pytest.approx(sum(ratios) / len(ratios), abs=1e-5)
    assert found[1].cett <= 0.3
    assert found[1].sparsity == pytest.approx(sum(shares) / len(shares))
    assert head_sparsity(loaded, blocks, Silent(), tokens=10)[0].tokens <= 10


def test_curves_are_scored_beside_dense(loaded: LoadedModel, blocks: Sequences, calibration: TextCalibration) -> None:
    runs = head_runs(calibration, list(KvPolicy), [0.0, 0.5])
    curves = kv_curves(loaded, runs, blocks, PROMPT, Silent())
    assert [curve.run for curve in curves] == [None, *runs]
    dense = curves[0]
    with torch.no_grad():
        logits = loaded.model(input_ids=blocks.ids[0][None, :-1], use_cache=False).logits[0, PROMPT - 1 :]
    naive = torch.nn.functional.cross_entropy(logits, blocks.ids[0][PROMPT:], reduction="none")
    torch.testing.assert_close(dense.nll[0], naive, atol=1e-5, rtol=1e-5)
    assert dense.perplexity() == pytest.approx(float(dense.nll.double().mean().exp()))
    for curve in curves[1:]:
        assert curve.run is not None
        assert curve.nll.shape == (len(blocks), BLOCK - PROMPT)
        assert curve.kept_frac == pytest.approx(1.0 if curve.run.drop == 0 else (1 + 0.5) / LAYERS)
        # the first scored token is predicted from the dense prompt
        torch.testing.assert_close(curve.nll[:, 0], dense.nll[:, 0], atol=1e-5, rtol=1e-5)
        same = torch.allclose(curve.nll, dense.nll, atol=1e-5)
        assert same == (curve.run.drop == 0)
    by_policy = {curve.run.policy: curve.nll for curve in curves[1:] if curve.run is not None and curve.run.drop}
    torch.testing.assert_close(by_policy[KvPolicy.LAZY], by_policy[KvPolicy.COMPUTE_ALL], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(by_policy[KvPolicy.DROP], by_policy[KvPolicy.COMPUTE_ALL], atol=1e-3)
