"""Task scores, throughput and co-activation: what is drawn and said of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import example_runs as example
import polars as pl
import pytest

from actsparse.report.figures import agreement, by_layer, coactivation, routing, tasks, throughput
from actsparse.report.panels import EvalPanel, ProfilePanel, eval_panels, profile_panels
from actsparse.report.sources import read_sources
from actsparse.results import EvalRow, Measure
from actsparse.store import tables


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ").replace("\u2212", "-")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> EvalPanel:
    mixed = tuple(
        EvalRow(plan="cats@0.5", metric="kept_frac", param=f"layer={layer},{where}", value=0.9, unit="share", n=10)
        for layer in range(4)
        for where in ("proj=q", "proj=up", "unit=kv_group")
    )
    path = example.eval_run(
        tmp_path_factory.mktemp("measured") / "eval", leave_out=("tokens", "timing", "generations"), extra=mixed
    )
    return eval_panels(read_sources((path,)))[0]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfilePanel:
    path = example.profile_run(
        tmp_path_factory.mktemp("measured") / "profile", leave_out=("neurons", "heads", "histograms", "probes")
    )
    return profile_panels(read_sources((path,)))[0]


def test_the_largest_sure_loss_is_named_and_idle_tasks_are_hollow(evaluation: EvalPanel) -> None:
    frame = tasks.scores(evaluation)
    text = plain(tasks.caption(frame))
    assert "griffin@0.25 on arithmetic: -30.0 points (-34.0 to -26.0) against dense, 30.0 % left" in text
    assert "Not exercised (hollow; the score is the dense model's): choices" in text
    figure = tasks.draw(frame, {})
    of_plan = next(trace for trace in figure.data if trace.name == "cats@0.5")
    assert list(of_plan.marker.symbol) == ["circle-open", "circle"]


def test_tasks_within_their_intervals_are_no_loss(evaluation: EvalPanel) -> None:
    frame = tasks.scores(evaluation).filter(~pl.col("plan").str.contains("griffin"))
    assert tasks.caption(frame).startswith("No plan loses for sure against dense on 2 tasks")


def test_where_speed_stops_paying_is_said(evaluation: EvalPanel) -> None:
    frame = throughput.by_batch(evaluation)
    assert sorted(frame["x"].unique()) == [1, 2, 4, 8]
    assert frame["gen_length"].unique().to_list() == [32]
    first = frame.filter((pl.col("plan") == "griffin@0.5") & (pl.col("x") == 1)).row(0, named=True)
    assert first["speedup"] == pytest.approx(first["dense_ms"] / first["ms"]) == pytest.approx(25.5 / 19.5)
    assert "The largest gain is 1.31×" in throughput.caption(frame)
    assert "Held fixed: prompt 128, generated 32." in throughput.caption(frame)
    assert throughput.by_length(evaluation)["axis"][0] == "gen_length"


def test_a_size_that_was_not_varied_makes_no_figure(evaluation: EvalPanel, tmp_path: Path) -> None:
    path = example.eval_run(tmp_path / "e", leave_out=("throughput", "tokens", "timing", "generations"))
    assert throughput.by_batch(eval_panels(read_sources((path,)))[0]).is_empty()


def test_the_correlation_of_hot_neurons_follows_from_the_counts(profiled: ProfilePanel) -> None:
    frame = coactivation.correlations(profiled)
    pair = frame.filter((pl.col("layer") == 0) & (pl.col("rank") == 1) & (pl.col("other_rank") == 2)).row(0, named=True)
    assert (pair["neuron"], pair["other"]) == (100, 101)
    assert pair["phi"] == pytest.approx(1.0)
    free = frame.filter((pl.col("layer") == 29) & (pl.col("rank") == 1) & (pl.col("other_rank") == 2))["phi"][0]
    assert free == pytest.approx(0.0, abs=0.01)
    never = frame.filter((pl.col("layer") == 0) & (pl.col("rank") == 12))["phi"]
    assert never.null_count() == never.len() == 11
    assert "of layer 0, phi 1.0" in coactivation.caption(frame)
    assert len(coactivation.draw(frame, {}).data) == 1


def test_units_are_drawn_apart(evaluation: EvalPanel) -> None:
    frame = by_layer.kept(evaluation)
    units = frame.filter(pl.col("plan") == "cats@0.5")["unit"].unique().sort().to_list()
    assert units == ["KV groups", "input channels", "neurons"]
    names = {trace.name for trace in by_layer.draw_kept(frame, {}).data}
    assert {"cats@0.5", "cats@0.5, input channels", "cats@0.5, KV groups", "griffin@0.5"} <= names


def test_projections_stand_as_their_mean_with_an_error_that_bounds_it(evaluation: EvalPanel) -> None:
    rows = [
        EvalRow(plan="teal@0.5", metric="rel_err", param=f"layer=0,proj={proj}", value=value, unit="1", n=9, stderr=off)
        for proj, value, off in (("q", 0.1, 0.01), ("up", 0.3, 0.05))
    ]
    frame = by_layer.errors(replace(evaluation, results=tables.frame(rows, EvalRow)))
    row = frame.row(0, named=True)
    assert (row["value"], row["stderr"]) == (pytest.approx(0.2), pytest.approx(0.03))


@pytest.mark.parametrize(("metric", "draw"), [("kl", agreement.draw_kl), ("top1", agreement.draw_top1)])
def test_agreement_has_the_interval_that_was_measured(evaluation: EvalPanel, metric: str, draw: Callable) -> None:
    frame = agreement.kl(evaluation) if metric == "kl" else agreement.top1(evaluation)
    for row in frame.iter_rows(named=True):
        of = evaluation.results.filter(pl.col("plan") == row["plan"])
        for end in ("low", "high"):
            assert row[end] == of.filter(pl.col("metric") == f"{metric}_{end}")["value"][0]
    first, bars = frame.row(0, named=True), draw(frame, {}).data[0].error_x
    assert float(bars.array[0]) == pytest.approx(first["high"] - first["value"], rel=1e-6)
    assert float(bars.arrayminus[0]) == pytest.approx(first["value"] - first["low"], rel=1e-6)
    assert bars.array[0] != bars.arrayminus[0]


def test_a_mixture_of_experts_shows_how_sparse_each_expert_is(profiled: ProfilePanel) -> None:
    shares = {(0, 0): 0.5, (0, 1): 0.6, (1, 0): 0.8, (1, 1): 0.74}
    rows = [
        Measure(
            metric="expert_cett_sparsity", layer=layer, kind="neuron", param=f"expert={expert},target={target}",
            value=value if target == 0.2 else 0.1, unit="share", n=100 + layer,
        )
        for (layer, expert), value in [*shares.items(), ((0, "shared"), 0.9)]
        for target in (0.1, 0.2)
    ]  # fmt: skip
    panel = replace(profiled, measures=tables.frame(rows, Measure))
    frame = routing.sparsities(panel)
    assert {(layer, expert): value for layer, expert, _, value, _ in frame.iter_rows()} == shares
    said = plain(routing.caption_sparsities(frame))
    assert "expert 0 of layer 0 loses 50.0 % of its neurons, expert 0 of layer 1 80.0 %" in said
    assert "those of a layer span 8.0 points on average. n = 100 to 101 tokens an expert" in said
    heat = routing.draw_sparsities(frame, {}).data[0]
    assert [list(row) for row in heat.z] == [pytest.approx([0.5, 0.8]), pytest.approx([0.6, 0.74])]
    assert routing.sparsities(profiled).is_empty()


def test_a_mixture_of_experts_shows_its_routing(profiled: ProfilePanel) -> None:
    rows = [
        Measure(
            metric="expert_frac", layer=layer, kind="router", param=f"expert={expert}", value=share, unit="share", n=90
        )
        for layer in range(2)
        for expert, share in enumerate((1.0, 0.6, 0.3, 0.1))
    ]
    rows += [
        Measure(metric="router_entropy", layer=layer, kind="router", value=0.5 + layer, unit="nats", n=90)
        for layer in range(2)
    ]
    moe = replace(profiled, measures=tables.frame(rows, Measure))
    frame = routing.loads(moe)
    assert frame.filter(pl.col("expert") == 0)["relative"].to_list() == [2.0, 2.0]
    assert "100 % of the tokens, 2.0 times an equal share; 2 of 8 experts" in plain(routing.caption_loads(frame))
    assert routing.draw_loads(frame, {}).data[0].z.shape == (4, 2)
    entropy = routing.entropies(moe)
    assert entropy["even"].to_list() == pytest.approx([math.log(4)] * 2)
    assert "surest in layer 0, 0.50 nats, and least in layer 1, 1.5; equal probabilities would give 1.4" in (
        routing.caption_entropies(entropy)
    )
    assert routing.loads(profiled).is_empty()
