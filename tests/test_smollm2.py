"""SmolLM2-135M-Instruct against the figures of methods.md, section 6: an independent implementation of the same page.

First four blocks of WikiText-2, S = 512, P = 256, float32, calibration on blocks 4 to 7.
"""

from collections.abc import Iterator
from math import log
from pathlib import Path

import polars as pl
import pytest

from actsparse import DataSpec, EvalSpec, ModelSpec, ProfileSpec, evaluate, profile
from actsparse.results import param
from actsparse.store.runs import EvalRun, ProfileRun

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "wikitext2-test.txt"
NEURON_NOISE, SEQUENCE_TOLERANCE = 0.03, 5e-3

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.shared,
    pytest.mark.skipif(not CORPUS.exists(), reason="the public evaluation data is not beside the checkout"),
]


@pytest.fixture(scope="module")
def kept_model(real_home: Path) -> Iterator[None]:
    """The machine's own cache, so that the model is fetched and converted once and not for every run of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTSPARSE_HOME", str(real_home))
        yield


@pytest.fixture(scope="module")
def evaluated(kept_model: None, tmp_path_factory: pytest.TempPathFactory) -> EvalRun:
    spec = EvalSpec(
        model=ModelSpec(name="smollm2"),
        data=DataSpec(corpus=str(CORPUS), limit=4),
        plans=("griffin@0.5", "static:stat=griffin@0.5", "cats@0.5", "griffin@0"),
        controls=False,
        generations=0,
        timing_pairs=2,
        timing_tokens=4,
        output=tmp_path_factory.mktemp("eval"),
    )
    return evaluate(spec)


@pytest.fixture(scope="module")
def profiled(kept_model: None, tmp_path_factory: pytest.TempPathFactory) -> ProfileRun:
    spec = ProfileSpec(
        model=ModelSpec(name="smollm2"),
        data=DataSpec(corpus=str(CORPUS), limit=4),
        output=tmp_path_factory.mktemp("profile"),
    )
    return profile(spec)


def value(run: EvalRun, plan: str, metric: str) -> float:
    return run.results.filter(plan=plan, metric=metric)["value"][0]


def test_dense_perplexity(evaluated: EvalRun) -> None:
    assert value(evaluated, "dense", "ppl") == pytest.approx(22.509, rel=1e-3)


@pytest.mark.parametrize(("plan", "expected"), [("griffin@0.5", 88.5), ("static:stat=griffin@0.5", 73.2)])
def test_sequence_level_masks(evaluated: EvalRun, plan: str, expected: float) -> None:
    assert value(evaluated, plan, "ppl") == pytest.approx(expected, rel=SEQUENCE_TOLERANCE)


def test_cats_within_the_noise_of_hard_masks(evaluated: EvalRun) -> None:
    assert log(value(evaluated, "cats@0.5", "ppl")) == pytest.approx(log(27.8), abs=NEURON_NOISE)


def test_nothing_dropped_is_dense_bit_for_bit(evaluated: EvalRun) -> None:
    tokens = evaluated.tokens
    dense, kept = (tokens.filter(plan=plan).sort("block", "position")["nll"] for plan in ("dense", "griffin@0"))
    assert (dense == kept).all()


def test_engine_equals_masked_path(evaluated: EvalRun) -> None:
    assert value(evaluated, "griffin@0", "path_check") < 1e-4
    assert value(evaluated, "griffin@0.5", "path_check") < 1e-3
    assert evaluated.warnings == ()


def test_speed_is_measured_beside_its_ceiling(evaluated: EvalRun) -> None:
    plan = next(plan for plan in evaluated.summary["plans"] if plan["plan"] == "griffin@0.5")
    assert plan["speed"]["ceiling"]["value"] == pytest.approx(1.42, abs=0.005)
    assert plan["speed"]["speedup_low"]["value"] <= plan["speed"]["speedup"]["value"]
    assert plan["sparsity"]["useful"]["neuron_frac"] == pytest.approx(0.5)
    cats = next(plan for plan in evaluated.summary["plans"] if plan["plan"] == "cats@0.5")
    assert cats["speed"]["ceiling"]["value"] == pytest.approx(1.245, abs=0.02)
    assert 0.4 < cats["sparsity"]["useful"]["neuron_frac"] < 0.6


@pytest.mark.parametrize(("target", "mean"), [(0.1, 0.493), (0.2, 0.670), (0.3, 0.782)])
def test_mean_cett_sparsity(profiled: ProfileRun, target: float, mean: float) -> None:
    rows = profiled.measures.filter(pl.col("layer").is_null(), metric="cett_sparsity", param=param(target=target))
    assert rows["value"].to_list() == [pytest.approx(mean, abs=2e-3)]


def test_byte_model(evaluated: EvalRun) -> None:
    assert evaluated.manifest.model is not None
    step = evaluated.manifest.model.step
    assert step.mlp_total / step.total == pytest.approx(0.59, abs=0.005)


@pytest.mark.parametrize(
    ("target", "layer", "sparsity", "eps"),
    [
        (0.1, 0, 0.771546, 0.319054),
        (0.1, 29, 0.824115, None),
        (0.2, 0, 0.893342, 0.689066),
        (0.2, 29, 0.928985, None),
        (0.3, 0, 0.947329, 1.154999),
        (0.3, 29, 0.962159, None),
    ],
)
def test_cett_of_single_layers(
    profiled: ProfileRun, target: float, layer: int, sparsity: float, eps: float | None
) -> None:
    """Golden values: thirty steps of plain bisection on the same 2,032 tokens, done apart from this package."""
    rows = profiled.measures.filter((pl.col("param") == param(target=target)) & (pl.col("layer") == layer))
    assert rows.filter(metric="cett_sparsity")["value"][0] == pytest.approx(sparsity, abs=1e-3)
    if eps is not None:
        assert rows.filter(metric="cett_eps")["value"][0] == pytest.approx(eps, rel=1e-3)
    assert set(rows["n"].to_list()) == {2032}
