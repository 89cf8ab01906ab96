"""Probes on a device: the rows of a CPU, for a dense model and a mixture of experts."""

from pathlib import Path

import polars as pl
import pytest
from tiny import save_tiny, words

from actsparse.pipelines.profile import profile
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec

pytestmark = pytest.mark.gpu
PROBES = ("uncertainty", "inertia", "union", "gradients")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_are_those_of_a_cpu(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    (tmp_path / "corpus.txt").write_text(words(1400, seed=1))
    data = DataSpec(corpus=str(tmp_path / "corpus.txt"), limit=6, block_length=64, prompt_length=32)
    found = []
    for device in ("cpu", "cuda"):
        model = ModelSpec(name=str(folder), device=device, dtype="float32")
        spec = ProfileSpec(model=model, data=data, output=tmp_path / device, probes=PROBES, masks=("topk", "cett"))
        rows = profile(spec).measures.filter(pl.col("param").str.contains("r=0.2|masks=cett|factor="))
        found.append(rows.select("metric", "layer", "param", "value"))
    on_cpu, on_device = found
    both = on_cpu.join(on_device, on=["metric", "layer", "param"], how="full", nulls_equal=True, coalesce=True)
    assert both.height == on_cpu.height == on_device.height
    # a ratio of two differences near zero may be anything
    plain = both.filter(~pl.col("metric").str.contains("sir|history_share|si1_p90"))
    assert plain["value"].is_null().equals(plain["value_right"].is_null())
    assert plain.select((pl.col("value") - pl.col("value_right")).abs().max()).item() < 0.02
