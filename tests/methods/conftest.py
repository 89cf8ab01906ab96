"""A tiny gated model, a calibration text, and the dense activations on it that naive definitions start from."""

from collections.abc import Callable

import pytest
import torch
from lengths import BLOCK, PROMPT, SINK
from tiny import LAYERS, make_tokenizer, words
from torch import Tensor

from actsparse.data.sequences import Sequences, blocks_of
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.calibration import TextCalibration, of_blocks
from actsparse.pipelines.progress import Silent
from actsparse.results import SiteKind


@pytest.fixture(scope="module")
def loaded(tiny_loaded: Callable) -> LoadedModel:
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def blocks() -> Sequences:
    return blocks_of(
        words(400, seed=3), make_tokenizer(), block_length=BLOCK, prompt_length=PROMPT, source="t", role="calibration"
    )


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel, blocks: Sequences) -> TextCalibration:
    return of_blocks(loaded, blocks, PROMPT, Silent())


@pytest.fixture(scope="module")
def dense(loaded: LoadedModel, blocks: Sequences) -> Callable[[SiteKind, int], Tensor]:
    """Activations [blocks, positions after the sink tokens, neurons] of a site in a layer, in float64."""
    kinds = (SiteKind.GATE, SiteKind.UP, SiteKind.NEURON)
    found: dict[tuple[SiteKind, int], list[Tensor]] = {(kind, i): [] for kind in kinds for i in range(LAYERS)}
    seen = {kind: lambda site, x: found[site.kind, site.layer].append(x[0, SINK:].double()) for kind in kinds}
    with tapped(loaded.sites, seen), torch.no_grad():
        for block in blocks.stack():
            loaded.model(input_ids=block[None], use_cache=False)
    return lambda kind, layer: torch.stack(found[kind, layer])


@pytest.fixture(scope="module")
def norms(loaded: LoadedModel) -> list[Tensor]:
    """||w_i|| of the down projection of every layer, in float64."""
    return [layer.down.weight.detach().double().norm(dim=0) for layer in loaded.sites.layers]
