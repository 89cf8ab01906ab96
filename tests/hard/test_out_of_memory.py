"""Memory that does not suffice: batches are halved once and it is said, then a clear error, and nothing is lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from processes import Zygote, little_memory
from tiny import make_model, make_tokenizer, words
from transformers.models.llama.modeling_llama import LlamaModel

from actsparse.engine.own import OwnRun
from actsparse.errors import ModelError, is_out_of_memory
from actsparse.pipelines import quality, recording
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.profile import profile
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.studies.run import study
from actsparse.pipelines.threshold import threshold
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec, StudySpec, ThresholdSpec


class Telling(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


# A profile


def spec(tiny_folder: Callable, prompts_file: Path, output: Path, **changes: object) -> ProfileSpec:
    return ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(prompts=(str(prompts_file),)),
        output=output,
        probes=(),
        **changes,  # pyright: ignore[reportArgumentType]
    )


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, batch: int, error: Exception) -> list[int]:
    """Let every batch of more sequences fail half-way through the model; returns the sizes that were tried."""
    record, tried = recording.Recorder.record, []
    on_value = recording.Recorder._on_value

    def failing(self: recording.Recorder, given: recording.Batch) -> None:
        tried.append(len(given.sequences))
        record(self, given)

    def seen(self: recording.Recorder, site: object, x: torch.Tensor) -> None:
        on_value(self, site, x)  # pyright: ignore[reportArgumentType]
        if tried[-1] > batch and getattr(site, "layer", 0) == 1:
            raise error

    monkeypatch.setattr(recording.Recorder, "record", failing)
    monkeypatch.setattr(recording.Recorder, "_on_value", seen)
    return tried


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
@pytest.mark.parametrize("checkpoint", [-1.0, 30.0])
def test_a_batch_that_does_not_fit_is_halved_once_and_the_numbers_are_the_same(
    error: Exception, checkpoint: float, tiny_folder: Callable, prompts_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = profile(spec(tiny_folder, prompts_file, tmp_path / "whole", batch_size=4))
    monkeypatch.setattr(recording, "CHECKPOINT_SECONDS", checkpoint)
    tried, telling = out_of_memory_above(monkeypatch, 3, error), Telling()
    run = profile(spec(tiny_folder, prompts_file, tmp_path / "run", batch_size=4), telling)
    assert telling.said == ["out of memory in batches of 4 sequences: going on with batches of 2"]
    assert tried == [4, 2, 2, 2, 2, 2, 2]
    places = ["metric", "layer", "kind", "param", "n"]
    assert run.all_measures.select(places).equals(whole.all_measures.select(places))
    found, expected = (one.all_measures["value"].fill_null(-1).to_list() for one in (run, whole))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("batch", "said"), [(8, "a batch of 4 sequences does not fit"), (1, "one sequence does not")])
def test_a_half_batch_that_does_not_fit_either_is_a_clear_error(
    batch: int, said: str, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(monkeypatch, 0, NO_MEMORY[0])
    with pytest.raises(ModelError, match=said) as error:
        profile(spec(tiny_folder, prompts_file, tmp_path / "run", batch_size=batch))
    assert "--device-map auto" in error.value.hint


def test_real_exhaustion_of_memory_is_recognised() -> None:
    with little_memory(2**28):
        with pytest.raises(RuntimeError, match="allocate memory") as of_torch:
            torch.ones(2**30)
        with pytest.raises(MemoryError) as of_python:
            bytearray(2**31)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_python.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


# What a profile probes, and what runs one sequence at a time


def test_probes_that_do_not_fit_start_anew_in_half_batches_with_the_same_rows(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ProfileSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(corpus=str(corpus_file), block_length=24, limit=12),
        probes=("uncertainty", "union"),
        output=tmp_path / "whole",
    )
    whole = profile(asked)
    read, tried = NeuronReader.read, []

    def failing(self: NeuronReader, ids: torch.Tensor, on_layer: Callable) -> None:
        tried.append(ids.numel())

        def seen(place: int, a: torch.Tensor) -> None:
            on_layer(place, a)
            if ids.numel() > 200 and len(tried) > 2 and place == 1:
                raise NO_MEMORY[0]

        read(self, ids, seen)

    monkeypatch.setattr(NeuronReader, "read", failing)
    monkeypatch.setattr("actsparse.pipelines.probes.reading.BATCH_TOKENS", 300)
    telling = Telling()
    run = profile(replace(asked, output=tmp_path / "run"), telling)
    assert telling.said[-1:] == ["out of memory in batches of 300 tokens: going on with batches of 150"]
    assert max(tried) > 200
    assert run.all_measures.equals(whole.all_measures)
    monkeypatch.setattr("actsparse.pipelines.probes.reading.BATCH_TOKENS", 600)
    with pytest.raises(ModelError, match="a batch of 300 tokens does not fit") as error:
        profile(replace(asked, output=tmp_path / "never"))
    assert "--probes none" in error.value.hint


@pytest.fixture
def eval_spec(tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> EvalSpec:
    return EvalSpec(
        model=ModelSpec(name=str(tiny_folder("llama")), device="cpu"),
        data=DataSpec(corpus=str(corpus_file), block_length=32, prompt_length=12, limit=3),
        plans=("griffin@0.5", "static@0.5"),
        controls=False,
        timing_pairs=0,
        generations=2,
        max_new_tokens=3,
        output=tmp_path / "run",
    )


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: Exception) -> None:
    """Let a function fail from its n-th call on."""
    whole, left = getattr(owner, name), iter(range(call))

    def failing(*args: object, **named: object) -> object:
        if next(left, None) is None:
            raise error
        return whole(*args, **named)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("owner", "name", "call"), [(quality, "scored_logits", 4), (OwnRun, "generate", 1)], ids=["scoring", "generating"]
)
def test_an_evaluation_of_one_sequence_at_a_time_says_what_does_not_fit_and_goes_on_when_it_does(
    owner: object, name: str, call: int, error: Exception, eval_spec: EvalSpec, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = evaluate(replace(eval_spec, output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fails_at(patch, owner, name, call, error)
        with pytest.raises(ModelError, match="one sequence does not fit beside the model") as said:
            evaluate(eval_spec)
    assert "shorter texts or blocks" in said.value.hint
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert len(list((tmp_path / "run" / "shards").glob("tokens-*"))) == (4 if name == "scored_logits" else 9)
    assert evaluate(eval_spec).results.equals(whole.results)


def test_calibration_that_does_not_fit_is_halved(
    eval_spec: EvalSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(replace(eval_spec, output=tmp_path / "whole"))
    tried, telling = out_of_memory_above(monkeypatch, 2, NO_MEMORY[0]), Telling()
    run = evaluate(eval_spec, telling)
    assert telling.said[0] == "out of memory in batches of 3 sequences: going on with batches of 1"
    assert tried == [3, 1, 1, 1]
    assert run.results["metric"].equals(whole.results["metric"])
    found, expected = (one.results["value"].fill_null(-1).to_list() for one in (run, whole))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_throughput_that_does_not_fit_is_measured_in_half_a_batch_or_left_out(
    eval_spec: EvalSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = OwnRun.prefill

    def failing(self: OwnRun, ids: torch.Tensor, **named: object) -> object:
        if len(ids) > 2:
            raise NO_MEMORY[0]
        return prefill(self, ids, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(OwnRun, "prefill", failing)
    telling = Telling()
    asked = replace(eval_spec, throughput=True, batch_sizes=(1, 4, 8), prompt_lengths=(8,), gen_lengths=(4,))
    found = evaluate(asked, telling).throughput
    assert sorted(found["batch_size"].unique()) == [1, 2]
    assert set(found.filter(pl.col("batch_size") == 2)["plan"]) == {"dense", *asked.plans}
    assert "out of memory in batches of 4 sequences: going on with batches of 2" in telling.said
    left_out = "griffin@0.5 at batch 8, prompt 8: no throughput (out of memory: a batch of 4 sequences does not fit"
    assert any(text.startswith(left_out) for text in telling.said)


def test_a_threshold_and_a_study_say_what_does_not_fit(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSpec(corpus=str(corpus_file), block_length=32, prompt_length=12, limit=3)
    model = ModelSpec(name=str(tiny_folder("llama")), device="cpu")
    run = profile(ProfileSpec(model=model, data=data, output=tmp_path / "profile", probes=()))
    fails_at(monkeypatch, LlamaModel, "forward", 0, NO_MEMORY[1])
    asked = ThresholdSpec(run=run.path, plan="griffin", target_ppl_increase=0.1, output=tmp_path / "plan")
    with pytest.raises(ModelError, match="one sequence does not fit beside the model"):
        threshold(asked)
    with pytest.raises(ModelError, match="one sequence does not fit beside the model"):
        study(StudySpec(model=model, data=data, study="window", quick=True, output=tmp_path / "study"))


# Real limits: the activations of a wide model fail first, whatever libraries take when they start


WIDE = 150_000
SPARE = 2**29


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 115 MB whose neurons take 0.6 MB a token, and texts for it."""
    folder = tmp_path_factory.mktemp("wide")
    make_model("llama", intermediate_size=WIDE, max_position_embeddings=2048).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text(words(4_500, seed=1))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": words(250, seed=i)}) + "\n" for i in range(16)))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["profile", "evaluate"])
def test_a_command_with_too_little_memory_says_so(name: str, wide: Path, zygote: Zygote, tmp_path: Path) -> None:
    command = {
        "profile": ["--prompts", str(wide / "prompts.jsonl"), "--batch-size", "16", "--probes", "none"],
        "evaluate": ["--corpus", str(wide / "corpus.txt"), "-n", "2", "--block-length", "2000", "--prompt-length", "50",
                     "--no-controls", "--plan", "griffin@0.5"],
    }[name]  # fmt: skip
    (tmp_path / "w").mkdir()
    asked = [name, "--model", str(wide / "model"), "--device", "cpu", *command, "-o", "out"]
    weights = (wide / "model" / "model.safetensors").stat().st_size
    code, _ = zygote.run(asked, tmp_path / "w", memory=2 * weights + SPARE)
    said = (tmp_path / "w.log").read_text()
    assert code == 1, said
    held = "a batch of 8 sequences" if name == "profile" else "one sequence"
    assert f"error: out of memory: {held} does not fit beside the model\nhint:" in said
    halved = "out of memory in batches of 16 sequences: going on with batches of 8" in said
    assert halved == (name == "profile")
    assert "Traceback" not in said


@pytest.mark.parametrize(("command", "limit"), [("report", 400_000), ("profile", 900_000)])
def test_too_few_addresses_for_the_libraries_are_said_before_they_end_the_process(command: str, limit: int) -> None:
    words = {"report": "report nowhere", "profile": "profile -m demo"}[command]
    line = f"ulimit -v {limit}; exec {sys.executable} -m actsparse {words}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: ulimit -v leaves 0." in done.stderr
    assert f"the libraries of `actsparse {command}` take" in done.stderr
    assert "hint: raise it" in done.stderr
    assert "Traceback" not in done.stderr
