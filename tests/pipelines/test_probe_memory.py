"""Memory that does not suffice for the probes: what is halved, and what cannot be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from listening import Listener
from transformers import LlamaModel

from actsparse.errors import ModelError
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.text import ProbeTexts
from actsparse.pipelines.profile import profile
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec


@pytest.fixture
def asked(tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> ProfileSpec:
    return ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(corpus=str(corpus_file), block_length=32, prompt_length=24, limit=4),
        probes=("inertia",),
        output=tmp_path / "run",
    )


def test_texts_that_do_not_fit_together_are_read_one_by_one(asked: ProfileSpec, monkeypatch, tmp_path: Path) -> None:
    whole = profile(replace(asked, output=tmp_path / "whole")).measures
    read, rows = NeuronReader.read, []

    def failing(self: NeuronReader, ids: torch.Tensor, *rest: object) -> None:
        rows.append(len(ids))
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        read(self, ids, *rest)

    monkeypatch.setattr(NeuronReader, "read", failing)
    # no more than four of the eight sequences fit; the blocks of the chance level are four
    found = profile(asked, telling := Listener()).measures
    assert sum("out of memory in batches" in said for said in telling.notes) == 1
    assert rows.count(8) == 1
    both = whole.join(found, on=["metric", "layer", "kind", "param"], how="full", nulls_equal=True, coalesce=True)
    assert both.height == whole.height == found.height
    assert both["value"].is_null().equals(both["value_right"].is_null())
    assert both.select((pl.col("value") - pl.col("value_right")).abs().max()).item() < 1e-4


def test_a_single_sequence_that_does_not_fit_is_not_tried_again(asked: ProfileSpec, monkeypatch) -> None:
    """The sentences of the 2x2 are fed one by one, or as one stream: no smaller batch would help."""
    sentences = (torch.arange(10, 22), torch.arange(30, 45))
    monkeypatch.setattr(ProbeTexts, "sentences", sentences)
    forward, tried = LlamaModel.forward, []

    def failing(self: LlamaModel, input_ids: torch.Tensor, **rest: object) -> object:
        if len(input_ids) == 1 and input_ids.shape[1] > sum(map(len, sentences)):
            tried.append(input_ids.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(LlamaModel, "forward", failing)
    # the stream of both sentences stands behind BOS
    with pytest.raises(ModelError, match="one sequence does not fit"):
        profile(replace(asked, data=replace(asked.data, block_length=24, prompt_length=20)), telling := Listener())
    assert tried == [1 + sum(map(len, sentences))]
    assert not any("out of memory in batches" in said for said in telling.notes)


def test_a_backward_pass_that_does_not_fit_is_not_tried_again(asked: ProfileSpec, monkeypatch) -> None:
    tried: list[int] = []

    def failing(_self: NeuronReader, ids: torch.Tensor, _on_layer: object) -> None:
        tried.append(len(ids))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(NeuronReader, "read_gradients", failing)
    with pytest.raises(ModelError, match="one sequence does not fit"):
        profile(replace(asked, probes=("gradients",)))
    assert tried == [1]
