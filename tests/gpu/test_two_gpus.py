"""Models spread over two GPUs, and two processes of a GPU each: the tables of one GPU."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from actsparse.models.load import load
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec

# a machine for the engine alone may lack the tables
pl = pytest.importorskip("polars")
profile = pytest.importorskip("actsparse.pipelines.profile").profile
evaluate = pytest.importorskip("actsparse.pipelines.evaluate").evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FAMILIES = ("llama", "mixtral", "gpt2")
DEEP = {"llama": "num_hidden_layers", "mixtral": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        return save_tiny(family, tmp_path / family, **{DEEP[family]: 6})

    return make


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{rng.randint(0, 60)}" for _ in range(1000)))
    return DataSpec(corpus=str(tmp_path / "text.txt"), limit=6, block_length=64, prompt_length=32)


def models(folder: Path) -> tuple[ModelSpec, ModelSpec]:
    """The model on one GPU, and spread over two."""
    one = ModelSpec(name=str(folder), device="cuda:0", dtype="float32")
    spread = ModelSpec(name=str(folder), device_map="balanced", dtype="float32")
    devices = {parameter.device for parameter in load(spread).model.parameters()}
    assert devices == {torch.device("cuda", 0), torch.device("cuda", 1)}
    return one, spread


def assert_same(found: "pl.DataFrame", expected: "pl.DataFrame") -> None:
    assert found.height == expected.height > 0
    for column in expected.columns:
        if not expected[column].dtype.is_float():
            assert found[column].equals(expected[column]), column
            continue
        assert found[column].is_null().equals(expected[column].is_null()), column
        values, wanted = found[column].drop_nulls().to_list(), expected[column].drop_nulls().to_list()
        assert values == pytest.approx(wanted, rel=1e-6, abs=1e-9), column


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_of_a_spread_model_is_that_of_one_gpu(
    family: str, folder: Callable[[str], Path], text: DataSpec, tmp_path: Path
) -> None:
    runs = [
        profile(ProfileSpec(model=model, data=text, probes=("uncertainty",), output=tmp_path / f"run{place}"))
        for place, model in enumerate(models(folder(family)))
    ]
    for table in ("all_measures", "neurons", "heads"):
        one, spread = (getattr(run, table) for run in runs)
        assert_same(spread, one)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_evaluation_of_a_spread_model_is_that_of_one_gpu(
    family: str, folder: Callable[[str], Path], text: DataSpec, tmp_path: Path
) -> None:
    plans = ("griffin@0.5", "static@0.5", *(("cats@0.5", "teal@0.3") if family == "llama" else ()))
    found = []
    for place, model in enumerate(models(folder(family))):
        spec = EvalSpec(
            model=model, data=text, plans=plans, timing_pairs=0, generations=1, max_new_tokens=4, path_check_tokens=0,
            output=tmp_path / f"eval{place}",
        )  # fmt: skip
        rows = evaluate(spec).results
        found.append(rows.filter(pl.col("metric").str.contains("^(nll|ppl|kl|top1)")))
    assert set(plans) <= set(found[0]["plan"])
    assert_same(found[1], found[0])


def test_two_processes_of_a_gpu_each_make_the_tables_of_one(folder: Callable[[str], Path], tmp_path: Path) -> None:
    rng = random.Random(1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join(f"w{rng.randint(0, 60)}" for _ in range(30)) for _ in range(12)))
    words = ["actsparse", "profile", "--model", str(folder("llama")), "--prompts", str(prompts), "--batch-size", "2",
             "--probes", "none", "--device", "cuda", "--dtype", "float32", "-o"]  # fmt: skip
    team = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    runs = []
    for launcher in ([], team):
        output = tmp_path / f"of{len(launcher)}"
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *words, str(output)],
            capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "4"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs.append(output)
    from actsparse.store.runs import ProfileRun

    one, two = (ProfileRun.open(run) for run in runs)
    for table in ("all_measures", "neurons", "heads"):
        assert_same(getattr(two, table), getattr(one, table))
