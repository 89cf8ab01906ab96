"""Memory of a device that really does not suffice: the batch is halved once, which is said, then a clear error."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from listening import Listener
from tiny import save_tiny, words

from actsparse.engine.choose import Engines
from actsparse.engine.cuda.bandwidth import read_bandwidth
from actsparse.errors import ModelError, is_out_of_memory
from actsparse.models.sites import resolve
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec

# a machine for the engine alone may lack the tables
pl = pytest.importorskip("polars")
profile = pytest.importorskip("actsparse.pipelines.profile").profile
evaluate = pytest.importorskip("actsparse.pipelines.evaluate").evaluate

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def limited(device: torch.device) -> Iterator[Callable[[float], None]]:
    """`limited(bytes)`: this process has no more of the device than that, until the test ends."""
    total = torch.cuda.get_device_properties(device).total_memory

    def limit(most: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(most / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096, **WIDE)
    return ModelSpec(name=str(folder), device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(words(70_000, seed=1))
    return str(path)


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of the device that were held for `work`."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_reserved()


def test_a_profile_halves_its_batch_once_and_then_gives_up(
    limited: Callable[[float], None], model: ModelSpec, corpus: str, tmp_path: Path
) -> None:
    asked = ProfileSpec(
        model=model, data=DataSpec(corpus=corpus, block_length=1024, limit=64), probes=(), output=tmp_path / "64"
    )

    def run(batch: int, listener: Listener | None = None) -> object:
        return profile(replace(asked, batch_size=batch, output=tmp_path / f"{batch}", force=True), listener)

    whole = run(64)
    most, half, quarter = (peak_of(lambda b=batch: run(b)) for batch in (64, 32, 16))
    assert most > half > quarter
    limited((most + half) / 2)
    found = run(64, telling := Listener())
    said = [text for text in telling.notes if "out of memory" in text]
    assert said == ["out of memory in batches of 64 sequences: going on with batches of 32"]
    assert found.measures.height == whole.measures.height
    limited((half + quarter) / 2)
    with pytest.raises(ModelError, match="a batch of 32 sequences does not fit beside the model") as error:
        run(64)
    assert "--batch-size 1" in error.value.hint


def test_throughput_halves_its_batch_once_and_then_leaves_the_size_out(
    limited: Callable[[float], None], model: ModelSpec, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its buffers are larger than all else here
    monkeypatch.setattr("actsparse.pipelines.evaluate.read_bandwidth", lambda _device: 4e12)
    asked = EvalSpec(
        model=model,
        data=DataSpec(corpus=corpus, block_length=64, prompt_length=32, limit=4),
        plans=("griffin@0.5",),
        timing_pairs=0,
        generations=0,
        path_check_tokens=0,
        controls=False,
        throughput=True,
        prompt_lengths=(3000,),
        gen_lengths=(8,),
    )

    def run(batch: int, listener: Listener | None = None) -> object:
        return evaluate(replace(asked, batch_sizes=(batch,), output=tmp_path / "run", force=True), listener)

    def held(batch: int) -> float:
        rows = run(batch).throughput
        return rows.filter(pl.col("metric") == "memory_mb")["value"].max() * 2**20

    most, half, quarter = (held(batch) for batch in (8, 4, 2))
    assert most > 1.5 * half > 2 * quarter
    limited((most + half) / 2)
    found = run(8, telling := Listener())
    assert set(found.throughput["batch_size"]) == {4}
    halved = "out of memory in batches of 8 sequences: going on with batches of 4"
    assert [text for text in telling.notes if "out of memory" in text] == [halved]
    assert halved in found.manifest.warnings
    limited((half + quarter) / 2)
    found = run(8, telling := Listener())
    assert found.throughput.height == 0
    left_out = "griffin@0.5 at batch 8, prompt 3000: no throughput (out of memory: a batch of 4 sequences does not fit"
    assert any(text.startswith(left_out) for text in telling.notes)


def test_a_step_without_room_for_its_cache_is_out_of_memory(limited: Callable[[float], None], model: ModelSpec) -> None:
    from actsparse.models.load import load

    loaded = load(model)
    engines = Engines(resolve(loaded.model))
    with engines.open((), sink_tokens=4, max_length=64, batch=2) as run:
        run.prefill(torch.ones(2, 8, dtype=torch.long, device="cuda"), watch=False)
    limited(torch.cuda.memory_allocated() + 2**26)
    with (
        pytest.raises(RuntimeError) as error,
        engines.open((), sink_tokens=4, max_length=200_000, batch=8),
    ):
        pass
    assert is_out_of_memory(error.value)


def test_the_bandwidth_is_measured_in_the_memory_that_there_is(
    limited: Callable[[float], None], device: torch.device
) -> None:
    whole = read_bandwidth(device)
    assert torch.cuda.memory_reserved() < 2**30, "its buffers were kept"
    limited(torch.cuda.memory_allocated() + 2**31)
    assert read_bandwidth(device) == pytest.approx(whole, rel=0.3)
    limited(torch.cuda.memory_allocated() + 2**27)
    with pytest.raises(RuntimeError) as error:
        read_bandwidth(device)
    assert is_out_of_memory(error.value)
