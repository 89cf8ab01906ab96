"""Probes on a device: the rows of a CPU, for a dense model and a mixture of experts."""

import random
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from actsparse.core.variance_shares import factor_levels, variance_sums
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec

# a machine for the engine alone may lack the tables
pl = pytest.importorskip("polars")
profile = pytest.importorskip("actsparse.pipelines.profile").profile

pytestmark = pytest.mark.gpu
PROBES = ("uncertainty", "inertia", "union", "gradients")

# How far a device may be off, as a share of the metric's largest value on the CPU. Rounding flips marginal neurons of
# masks, which moves what is a difference of two of their means the most; SI1 is a mean of 32 signs.
TOLERANCE = {"si2_j": 0.05, "m2": 0.02, "si1": 0.07, "matrix_2x2": 0.02, "hu4": 0.005, "si3": 1e-3, "si3_chance": 1e-3}
OF_MASKS = 0.01


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sentences of 20 kinds of words, some of them frequent enough for HU2 (`w5` is the full stop)."""
    rng, found = random.Random(2), []
    while len(found) < 1400:
        found += [f"w{6 + min(int(rng.expovariate(0.2)), 19)}" for _ in range(rng.randint(11, 16))] + ["."]
    (tmp_path / "corpus.txt").write_text(" ".join(found))
    return tmp_path / "corpus.txt"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_are_those_of_a_cpu(family: str, corpus: Path, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w5"', '"."'))
    data = DataSpec(corpus=str(corpus), limit=6, block_length=64, prompt_length=32)
    found = []
    for device in ("cpu", "cuda"):
        model = ModelSpec(name=str(folder), device=device, dtype="float32")
        spec = ProfileSpec(model=model, data=data, output=tmp_path / device, probes=PROBES, masks=("topk", "cett"))
        run = profile(spec).measures
        probed = run.filter(
            pl.col("param").str.contains("r=0.2|masks=cett|factor=|bin=") | pl.col("metric").str.contains("^hu4")
        )
        found.append(probed.select("metric", "layer", "kind", "param", "value"))
    on_cpu, on_device = found
    keys = ["metric", "layer", "kind", "param"]
    both = on_cpu.join(on_device, on=keys, how="full", nulls_equal=True, coalesce=True)
    assert both.height == on_cpu.height == on_device.height
    hu2 = on_cpu.filter((pl.col("metric") == "hu2") & pl.col("layer").is_not_null())
    assert hu2.height > 0
    assert hu2["value"].null_count() == 0
    # a ratio of two differences near zero may be anything
    plain = both.filter(~pl.col("metric").str.contains("sir|history_share|si1_p90"))
    assert plain["value"].is_null().equals(plain["value_right"].is_null())
    name = pl.col("metric").str.replace("_(low|high)$", "")
    off = (
        plain.with_columns(name=name, apart=(pl.col("value") - pl.col("value_right")).abs())
        .group_by("name")
        .agg(apart=pl.col("apart").max(), size=pl.col("value").abs().max())
    )
    for metric, apart, size in off.iter_rows():
        assert size is not None, metric
        assert size > 0, metric
        assert apart <= TOLERANCE.get(metric, OF_MASKS) * size, metric
    measured = set(off["name"])
    assert {"hu1", "hu2", "m2", "si1", "si2_j", "si3", "union", "matrix_2x2"} <= measured
    assert ("hu4" in measured) == (family == "llama")


def test_sums_behind_variance_shares_are_the_same_to_the_last_bit(device: torch.device) -> None:
    a = torch.randn(2048, 512, device=device)
    levels = factor_levels(torch.randint(40, (4, 512)))
    first, *others = (variance_sums(a, levels) for _ in range(5))
    assert all(torch.equal(first.cross, other.cross) and first.square == other.square for other in others)
