"""Numbers at the edge: defined answers or clear errors; and the same bytes when a command is repeated."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, save_tiny, words
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actsparse.cli.app import main
from actsparse.errors import DataError, ModelError
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.profile import profile
from actsparse.pipelines.threshold import threshold
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store.runs import EvalRun, PlanRun, ProfileRun, open_any

PLANS = ("griffin@0.5", "cats@0.5", "teal@0.5", "static@0.5", "tda@0.5")


def profiled(
    model: Path, prompts: Path, output: Path, *, dtype: str = "auto", sink: int = 4, strict: bool = False
) -> ProfileRun:
    return profile(
        ProfileSpec(
            model=ModelSpec(name=str(model), device="cpu", dtype=dtype),
            data=DataSpec(prompts=(str(prompts),), sink_tokens=sink, block_length=16, prompt_length=8),
            output=output, probes=(), strict=strict, batch_size=3,
        )
    )  # fmt: skip


def evaluated(model: Path, corpus: Path, output: Path, plans: tuple[str, ...] = PLANS) -> EvalRun:
    return evaluate(
        EvalSpec(
            model=ModelSpec(name=str(model), device="cpu"),
            data=DataSpec(corpus=str(corpus), limit=2, block_length=24, prompt_length=12),
            plans=plans, controls=False, timing_pairs=0, generations=1, max_new_tokens=3, output=output,
        )
    )  # fmt: skip


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A tiny model whose weights were changed."""
    save_tiny("llama", folder)
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def all_finite(run: ProfileRun | EvalRun) -> bool:
    table = run.all_measures if isinstance(run, ProfileRun) else run.results
    return all(math.isfinite(value) for value in table["value"].drop_nulls().to_list())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_counted_and_said(value: float, prompts_file: Path, tmp_path: Path) -> None:
    def edit(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.1.mlp.up_proj.weight"][5] = value

    model = edited(tmp_path / "model", edit)
    run = profiled(model, prompts_file, tmp_path / "run")
    assert any("layer 1, up" in text and "NaN or infinite" in text for text in run.warnings)
    assert all_finite(run)
    with pytest.raises(ModelError, match="NaN or infinite") as error:
        profiled(model, prompts_file, tmp_path / "strict", strict=True)
    assert "--dtype float32" in error.value.hint


def test_half_precision_that_overflows_is_counted_and_said(prompts_file: Path, tmp_path: Path) -> None:
    def edit(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.0.mlp.up_proj.weight"] *= 3e4

    model = edited(tmp_path / "model", edit)
    wide = profiled(model, prompts_file, tmp_path / "wide")
    assert wide.warnings == ()
    narrow = profiled(model, prompts_file, tmp_path / "narrow", dtype="float16")
    assert any("NaN or infinite" in text for text in narrow.warnings)
    assert all_finite(narrow)


def test_a_model_that_scores_nan_is_said(corpus_file: Path, tmp_path: Path) -> None:
    def edit(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.1.mlp.down_proj.weight"][3] = math.nan

    model = edited(tmp_path / "model", edit)
    run = evaluated(model, corpus_file, tmp_path / "eval", ("griffin@0.5",))
    assert any("NaN" in text or "finite" in text for text in run.warnings)
    for plan in ("dense", "griffin@0.5"):
        assert run.results.filter(plan=plan, metric="ppl")["value"].to_list() == [None], (
            "not a number is written as null"
        )
    assert main(["report", str(run.path), "-o", str(tmp_path / "page.html"), "-q"]) == 0
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")


def test_layers_of_zeros_have_defined_answers(prompts_file: Path, corpus_file: Path, tmp_path: Path) -> None:
    def edit(held: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            if "layers.0.mlp" in name or "layers.1.self_attn.v_proj" in name:
                tensor.zero_()

    model = edited(tmp_path / "model", edit)
    run = profiled(model, prompts_file, tmp_path / "run")
    assert all_finite(run)
    assert run.measures.filter(metric="zero_frac", layer=0, kind="neuron")["value"].to_list() == [1.0]
    for plan in PLANS:
        threshold(ThresholdSpec(run=run.path, plan=plan, device="cpu", output=tmp_path / plan))
    found = evaluated(model, corpus_file, tmp_path / "eval")
    assert all_finite(found)
    dense = found.results.filter(plan="dense", metric="ppl")["value"][0]
    assert 1 < dense < math.inf


def test_prompts_of_one_token(tiny_folder: Callable, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("w1\n\nw2\n\nw3")
    with pytest.raises(DataError, match="no token is left"):
        profiled(tiny_folder("llama"), path, tmp_path / "run")
    run = profiled(tiny_folder("llama"), path, tmp_path / "all", sink=0)
    assert run.measures.filter(metric="tokens")["value"].to_list() == [6]
    assert all_finite(run)


def test_prompts_of_different_lengths_count_their_own_tokens_alone(tiny_folder: Callable, tmp_path: Path) -> None:
    lengths = (6, 40, 7, 25, 9)
    path = tmp_path / "p.txt"
    path.write_text("\n\n".join(words(length, seed=length) for length in lengths))
    run = profiled(tiny_folder("llama"), path, tmp_path / "run")
    assert run.measures.filter(metric="tokens")["value"].to_list() == [sum(lengths) + len(lengths) * (1 - 4)]


def test_a_model_of_one_layer(prompts_file: Path, corpus_file: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    run = profiled(model, prompts_file, tmp_path / "run")
    assert set(run.neurons["layer"].to_list()) == {0}
    found = evaluated(model, corpus_file, tmp_path / "eval")
    assert all_finite(found)
    assert set(found.results["plan"].unique()) == {"dense", *PLANS}


def test_a_vocabulary_of_two(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    make_model("llama", vocab_size=2, **plain).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)
    text.write_text("a b b a " * 60)
    found = evaluated(folder, text, tmp_path / "eval", ("griffin@0.5", "cats@0.5"))
    assert all_finite(found)
    assert profiled(folder, text, tmp_path / "run").measures.height


def test_a_vocabulary_smaller_than_its_tokenizer_is_refused(prompts_file: Path, tmp_path: Path) -> None:
    plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with pytest.raises(ModelError, match="token ids up to 119, its model 2 embeddings"):
        profiled(save_tiny("llama", tmp_path / "m", vocab_size=2, **plain), prompts_file, tmp_path / "run")


def test_a_repeated_command_gives_the_same_bytes(
    tiny_folder: Callable, prompts_file: Path, corpus_file: Path, tmp_path: Path
) -> None:
    runs: list[list[ProfileRun | PlanRun | EvalRun]] = []
    for name in ("one", "two"):
        folder, model = tmp_path / name, tiny_folder("llama")
        first = profiled(model, prompts_file, folder / "profile")
        plan = threshold(ThresholdSpec(run=first.path, plan="dejavu@0.5", device="cpu", output=folder / "plan"))
        runs.append([first, plan, evaluated(model, corpus_file, folder / "eval")])
    for one, two in zip(*runs, strict=True):
        names = {file.path for file in one.manifest.files} - {"summary.json", "timing.parquet"}
        assert names == {file.path for file in two.manifest.files} - {"summary.json", "timing.parquet"}
        for name in names:
            assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
        assert open_any(one.path).manifest.fingerprint == two.manifest.fingerprint
