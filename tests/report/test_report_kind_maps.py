"""The heat map of sparsity: its shares against a naive computation on the values themselves, and what it says."""

from dataclasses import replace
from pathlib import Path

import example_runs as example
import numpy as np
import polars as pl
import pytest

from actsparse.report.figures import kind_maps
from actsparse.report.panels import ProfilePanel, profile_panels
from actsparse.report.sources import read_sources

EDGES = np.concatenate([[0.0], np.logspace(-8, 4, 12_001)])


def counted(values: np.ndarray) -> np.ndarray:
    return np.histogram(np.abs(values), EDGES)[0].astype(np.float64)


def naive_below_error(values: np.ndarray, error: float) -> float:
    ordered = np.sort(np.abs(values))
    energy = np.cumsum(ordered**2)
    return float((energy <= error**2 * energy[-1]).mean())


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> ProfilePanel:
    path = example.profile_run(tmp_path_factory.mktemp("maps") / "p", leave_out=("neurons", "heads", "probes"))
    return profile_panels(read_sources((path,)))[0]


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("shape", ["gaussian", "heavy", "relu"])
def test_the_share_that_can_go_is_that_of_the_sorted_values(error: float, shape: str) -> None:
    drawn = np.random.default_rng(3).normal(size=40_000)
    values = {"gaussian": drawn, "heavy": np.sign(drawn) * np.abs(drawn) ** 4, "relu": np.maximum(drawn, 0)}[shape]
    assert kind_maps.below_error(counted(values), EDGES, error) == pytest.approx(
        naive_below_error(values, error), abs=2e-3
    )


def test_a_gaussian_gives_what_the_help_says() -> None:
    drawn = np.random.default_rng(5).normal(size=400_000)
    assert kind_maps.below_error(counted(drawn), EDGES, 0.2) == pytest.approx(0.416, abs=0.004)
    assert kind_maps.below_rms(counted(3 * drawn), EDGES, 0.1) == pytest.approx(0.0797, abs=0.002)


def test_values_of_zero_alone_are_wholly_sparse() -> None:
    counts = counted(np.zeros(5))
    assert kind_maps.below_error(counts, EDGES, 0.2) == 1.0
    assert kind_maps.below_rms(counts, EDGES, 0.1) == 1.0


def test_the_map_says_what_it_draws_and_the_menu_holds_every_measure(panel: ProfilePanel) -> None:
    frame = kind_maps.sparsity(panel)
    figure = kind_maps.draw_sparsity(frame, {})
    labels = [choice["label"] for choice in figure.layout.meta["variants"]["choices"]]
    assert labels[0] == "dropped at 20 % error of the activation"
    assert labels[-1] == "exact zeros"
    z = np.asarray(figure.data[0].z)
    mean = frame.filter((pl.col("measure") == "error=0.2") & (pl.col("kind") == "up"))["value"].mean()
    assert z[list(figure.data[0].y).index("up")].mean() == pytest.approx(mean)
    caption = kind_maps.caption_sparsity(frame).replace("\u202f", " ")
    assert caption.startswith("Drawn: the share of the smallest values")
    assert f"{100 * frame.filter(pl.col('measure') == 'error=0.2')['value'].max():.0f} % (" in caption
    assert "There are no exact zeros." in caption


def test_a_profile_without_histograms_has_no_map(panel: ProfilePanel) -> None:
    assert kind_maps.sparsity(replace(panel, histograms={})).is_empty()


def test_zeros_of_a_relu_model_are_counted(tmp_path: Path) -> None:
    path = example.profile_run(tmp_path / "p", relu=True, leave_out=("neurons", "heads", "probes"))
    panel = profile_panels(read_sources((path,)))[0]
    assert "Most exact zeros are in" in kind_maps.caption_zeros(kind_maps.zeros(panel))
    assert "exact zeros" not in kind_maps.caption_sparsity(kind_maps.sparsity(panel))
