"""The decode phase of a profile: the model's own greedy tokens, recorded as a phase of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CONTEXT
from torch import Tensor

from actsparse.cli.app import main
from actsparse.data.texts import TextReader
from actsparse.errors import DataError, RunError
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.continuation import greedy
from actsparse.pipelines.profile import profile
from actsparse.results import Site, SiteKind
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

NEW = 6


def profiled(folder: Path, data: DataSpec, output: Path, **options: object) -> ProfileRun:
    return profile(ProfileSpec(model=ModelSpec(name=str(folder), device="cpu"), data=data, output=output, **options))


def prompts_of(loaded: LoadedModel, data: DataSpec) -> tuple[Tensor, ...]:
    return TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _line: None).profile_sequences().ids


@torch.no_grad()
def naive_continuation(loaded: LoadedModel, ids: Tensor, new: int) -> Tensor:
    """One token at a time, the whole sequence again at each, until the end of text."""
    start = len(ids)
    for _ in range(new):
        token = loaded.model(input_ids=ids[None]).logits[0, -1].argmax()
        if int(token) == loaded.model.generation_config.eos_token_id:
            break
        ids = torch.cat([ids, token[None]])
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_continuations_are_greedy_and_end_at_the_end_of_text(
    family: str, tiny_loaded: Callable, prompts_file: Path
) -> None:
    loaded = tiny_loaded(family)
    prompts = prompts_of(loaded, DataSpec(prompts=(str(prompts_file),)))
    found = greedy(loaded, prompts, 12)
    expected = [naive_continuation(loaded, ids, 12) for ids in prompts]
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_rows_of_decode_are_those_of_the_written_tokens(
    tiny_folder: Callable, tiny_loaded: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    data = DataSpec(prompts=(str(prompts_file),))
    run = profiled(tiny_folder("llama"), data, tmp_path / "p", decode=NEW)
    loaded = tiny_loaded("llama")
    rows: dict[int, list[Tensor]] = {}
    start = 0

    def keep(site: Site, x: Tensor) -> None:
        rows.setdefault(site.layer, []).append(x[0, start:].double())

    for ids in prompts_of(loaded, data):
        written = naive_continuation(loaded, ids, NEW)
        start = len(ids)
        with tapped(loaded.sites, {SiteKind.NEURON: keep}), torch.no_grad():
            loaded.model(input_ids=torch.cat([ids, written])[None])
    tokens = len(torch.cat(rows[0]))
    measures = run.decode_measures
    assert measures.filter(metric="tokens")["value"].to_list() == [tokens]
    assert measures.filter(metric="tokens")["param"].to_list() == ["phase=decode"]
    for layer, parts in rows.items():
        a = torch.cat(parts)
        rms = measures.filter(metric="rms", layer=layer, kind="neuron")["value"].to_list()
        assert rms == [pytest.approx(float(a.square().mean().sqrt()), rel=1e-4)]
        mean_abs = run.decode_neurons.filter(layer=layer).sort("neuron")["mean_abs"].to_list()
        assert mean_abs == pytest.approx(a.abs().mean(dim=0).tolist(), rel=1e-3)


def test_prefill_is_what_it_is_without_decode(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    data = DataSpec(prompts=(str(prompts_file),))
    both = profiled(tiny_folder("llama"), data, tmp_path / "both", decode=NEW)
    one = profiled(tiny_folder("llama"), data, tmp_path / "one")
    assert both.measures.equals(one.measures)
    assert both.neurons.equals(one.neurons)
    assert both.heads.equals(one.heads)
    assert both.all_measures.height == both.measures.height + both.decode_measures.height
    assert set(both.decode_measures["metric"]) >= {"cett_sparsity", "rms", "abs_quantile", "neuron_gini"}
    params = both.decode_measures.filter(metric="cett_sparsity")["param"].unique().sort().to_list()
    assert params == [f"phase=decode,target={target}" for target in ("0.1", "0.2", "0.3")]
    assert one.decode_measures.height == 0
    with pytest.raises(RunError, match="neurons_decode"):
        _ = one.decode_neurons


def test_a_corpus_is_continued_after_the_first_p_tokens(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    data = DataSpec(corpus=str(corpus_file), block_length=64, prompt_length=24, limit=5)
    run = profiled(tiny_folder("opt"), data, tmp_path / "p", decode=3)
    assert run.decode_measures.filter(metric="tokens")["value"][0] <= 15
    positions = run.decode_measures.filter(metric="position_rms")["param"].unique().to_list()
    assert positions == ["from=16,phase=decode,to=32"]


def test_a_prompt_that_fills_the_context_leaves_no_room(tiny_folder: Callable, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(["w7"] * (CONTEXT - 1)))
    with pytest.raises(DataError, match="no prompt leaves room"):
        profiled(tiny_folder("gpt2"), DataSpec(prompts=(str(path),)), tmp_path / "p", decode=4)


def test_the_command_line_takes_it_and_its_answer_stays_that_of_prefill(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["profile", "--model", str(tiny_folder("llama")), "--prompts", str(prompts_file), "-o", str(tmp_path / "p")]
    assert main([*argv, "--decode", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("CETT 0.2") == 1
    assert main([*argv, "--decode", "-1"]) == 1
