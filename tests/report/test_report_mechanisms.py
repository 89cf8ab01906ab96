"""The figures of uncertainty and inertia: what they draw, and that their captions follow the numbers."""

from collections.abc import Callable
from dataclasses import replace

import example_probes
import example_runs as example
import polars as pl
import pytest

from actsparse.report.mechanism_rows import ROWS
from actsparse.report.panels import ProfilePanel, profile_panels
from actsparse.report.registry import ROWS as EVERY_ROW
from actsparse.report.rows import Row
from actsparse.report.sources import read_sources
from actsparse.results import Measure
from actsparse.store import tables

BY_ID = {row.id: row for row in ROWS}


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> ProfilePanel:
    path = example.profile_run(
        tmp_path_factory.mktemp("probed") / "profile", leave_out=("neurons", "heads", "histograms")
    )
    return profile_panels(read_sources((path,)))[0]


def with_measures(panel: ProfilePanel, change: Callable[[pl.DataFrame], pl.DataFrame]) -> ProfilePanel:
    return replace(panel, measures=change(panel.measures))


def said(row: Row, panel: ProfilePanel) -> str:
    return row.caption(row.data(panel)).replace("\u202f", " ")


@pytest.mark.parametrize("row", ROWS, ids=list(BY_ID))
def test_every_figure_draws_its_data_with_titled_axes(row: Row, panel: ProfilePanel) -> None:
    frame = row.data(panel)
    figure = row.draw(frame, {})
    layout = figure.to_plotly_json()["layout"]
    assert layout["xaxis"]["title"]["text"]
    assert layout["yaxis"]["title"]["text"] or layout["yaxis"]["type"] == "category"
    assert len(figure.data) >= 2
    assert "n = " in said(row, panel)


@pytest.mark.parametrize("row", ROWS, ids=list(BY_ID))
def test_a_profile_without_probes_has_no_such_figure(row: Row, panel: ProfilePanel) -> None:
    bare = replace(panel, measures=panel.measures.clear(), probes={})
    assert row.data(bare).is_empty()


@pytest.mark.parametrize("row", [row for row in EVERY_ROW if row.made_by], ids=lambda row: row.id)
def test_a_figure_that_another_command_makes_names_that_command(row: Row) -> None:
    assert row.command == row.made_by


def test_the_command_of_each_figure_names_its_probe() -> None:
    probes = {row.id: row.command.rsplit(" ", 1)[-1] for row in ROWS}
    assert {probes["hu1"], probes["ladder"], probes["union"]} == {"uncertainty", "inertia", "union"}


def test_a_null_overlap_is_a_gap_and_no_zero(panel: ProfilePanel) -> None:
    frame = BY_ID["ladder"].data(panel)
    within = frame.filter((pl.col("metric") == "overlap_w") & (pl.col("rung") == "repeat"))
    assert within.is_empty()
    figure = BY_ID["ladder"].draw(frame, {})
    assert "repeat" not in list(figure.data[0].x)
    matrix = BY_ID["matrix"].draw(BY_ID["matrix"].data(panel), {})
    cells = matrix.data[0].z
    assert cells[0][1] != cells[0][1]  # NaN: that pair has no kappa


def test_the_hot_set_is_told_from_inertia(panel: ProfilePanel) -> None:
    text = said(BY_ID["ladder"], panel)
    assert "share 0.264 of the neurons kept at 20 %; chance gives 0.200, a static hot set 0.248" in text
    assert "explains 75 % of the excess" in text


def test_chance_is_drawn_for_each_kind_of_pair_where_they_part(panel: ProfilePanel) -> None:
    """As in a mixture of experts, where tokens of one text share more experts than others."""
    one_level = BY_ID["ladder"].draw(BY_ID["ladder"].data(panel), {})
    assert [trace.name for trace in one_level.data[3:]] == [
        "uniform chance", "popularity, natural", "popularity, own",
    ]  # fmt: skip
    levels = {"neighbour": 0.18, "within": 0.14, "between": 0.1}

    def change(measures: pl.DataFrame) -> pl.DataFrame:
        rows = example_probes.Rows(1)
        for rung in ("natural", "uniform-random"):
            for pairs, level in levels.items():
                rows.add("e_uniform", level, r=0.2, rung=rung, pairs=pairs)
                rows.add("e_pop", level + 0.01, r=0.2, rung=rung, pairs=pairs, pop="own")
        kept = measures.filter(~pl.col("param").str.contains("pairs=.*rung="))
        return pl.concat([kept, pl.DataFrame(rows.found, schema=kept.schema)])

    mixture = with_measures(panel, change)
    figure = BY_ID["ladder"].draw(BY_ID["ladder"].data(mixture), {})
    uniform = [trace for trace in figure.data if trace.name == "uniform chance"]
    assert [float(trace.y[0]) for trace in uniform] == pytest.approx(list(levels.values()))
    assert [trace.line.color for trace in uniform] == [trace.line.color for trace in figure.data[:3]]
    assert not any(trace.showlegend for trace in uniform)
    assert [trace.name for trace in figure.data if trace.showlegend][3:] == [
        "uniform chance, of each kind", "popularity, natural, of each kind", "popularity, own, of each kind",
    ]  # fmt: skip
    assert "chance gives 0.140, a static hot set 0.150" in said(BY_ID["ladder"], mixture)


def test_chance_follows_the_distance_where_it_was_measured(panel: ProfilePanel) -> None:
    def change(measures: pl.DataFrame) -> pl.DataFrame:
        rows = example_probes.Rows(1)
        for power in range(9):
            rows.add("e_uniform", 0.2 - 0.01 * power, r=0.2, d=2**power, pairs="distance")
        return pl.concat([measures, pl.DataFrame(rows.found, schema=measures.schema)])

    flat = BY_ID["overlap-distance"].data(panel).filter(pl.col("r") == 0.2)["uniform"]
    assert flat.to_list() == [0.2] * 9
    own = with_measures(panel, change)
    frame = BY_ID["overlap-distance"].data(own).filter(pl.col("r") == 0.2)
    assert frame["uniform"].to_list() == pytest.approx([0.2 - 0.01 * power for power in range(9)])
    text = said(BY_ID["overlap-distance"], own)
    assert "; uniform chance 0.20, popularity 0.25), 256 apart " in text
    assert "; uniform chance 0.12, popularity 0.25)" in text


@pytest.mark.parametrize(
    ("sir", "j", "expected"),
    [
        (1.1, 0.02, "needs no meaning"),
        (0.1, 0.02, "is mostly semantic"),
        (0.5, 0.02, "is partly semantic"),
        (None, 0.02, "SIR is not defined"),
        (0.5, 0.001, "nothing to split"),
    ],
)
def test_what_si2_says_follows_its_interval(panel: ProfilePanel, sir: float | None, j: float, expected: str) -> None:
    def change(measures: pl.DataFrame) -> pl.DataFrame:
        rows = example_probes.Rows(1)
        rows.add_interval("si2_j", j, 0.004, r=0.2, rung="natural", pop="nat")
        rows.add_interval("sir", sir, 0.1, r=0.2, pop="nat")
        kept = measures.filter(~pl.col("metric").str.contains("^(si2_j|sir)"))
        return pl.concat([kept, pl.DataFrame(rows.found, schema=kept.schema)])

    assert expected in said(BY_ID["ladder-excess"], with_measures(panel, change))


def test_the_history_share_decides_what_hu1_says(panel: ProfilePanel) -> None:
    assert "HU1 = 0.78 (0.76\u20130.80)" in said(BY_ID["hu1"], panel)
    assert "is 22 % (18\u201326): the token decides most" in said(BY_ID["hu1"], panel)
    other = with_measures(
        panel,
        lambda frame: frame.with_columns(
            value=pl.when(pl.col("metric") == "history_share").then(0.8).otherwise(pl.col("value"))
        ),
    )
    assert "the history decides most" in said(BY_ID["hu1"], other)


def test_hu1_by_layer_stands_above_both_chance_levels_with_intervals(panel: ProfilePanel) -> None:
    frame = BY_ID["hu1-layers"].data(panel)
    assert set(frame["pop"]) == {"", "nat"}
    assert frame["low"].null_count() == frame["high"].null_count() == 0
    figure = BY_ID["hu1-layers"].draw(frame, {})
    names = [trace.name for trace in figure.data]
    assert sum("(uniform)" in name for name in names) == sum("(popularity)" in name for name in names) >= 2
    assert all(trace.error_y.array is not None for trace in figure.data)
    rows = frame.filter((pl.col("control") == "") & (pl.col("pop") == "nat") & (pl.col("r") == 0.2)).sort("value")
    text = said(BY_ID["hu1-layers"], panel)
    low = rows.row(0, named=True)
    assert f"{low['value']:.2f} ({low['low']:.2f}\u2013{low['high']:.2f}) in layer {low['layer']}" in text
    assert text.index("Above uniform chance") < text.index("Above popularity")


def test_a_broken_control_is_said(panel: ProfilePanel) -> None:
    identical = (pl.col("metric") == "hu1") & pl.col("param").str.contains("identical")
    broken = with_measures(
        panel, lambda frame: frame.with_columns(value=pl.when(identical).then(0.1).otherwise(pl.col("value")))
    )
    assert "instead of 0: a fault" in said(BY_ID["hu1"], broken)
    assert "fault" not in said(BY_ID["hu1"], panel)


def test_the_2x2_calls_it_inertia_only_beyond_the_intervals(panel: ProfilePanel) -> None:
    assert "random words 0.10 (0.08\u20130.12) alone and 0.21 (0.19\u20130.23) in one stream" in said(
        BY_ID["matrix"], panel
    )
    assert "more alike: inertia" in said(BY_ID["matrix"], panel)
    frame = BY_ID["matrix"].data(panel).drop_nulls("kappa")
    above = {name: float(one["kappa"].mean()) for (name,), one in frame.group_by("chance")}
    assert above["uniform chance"] - above["popularity"] == pytest.approx(0.2, abs=1e-6)
    assert "Above popularity they are" in said(BY_ID["matrix"], panel)
    stream = pl.col("param").str.contains("sequential") & pl.col("metric").str.starts_with("matrix_2x2")
    same = with_measures(
        panel, lambda frame: frame.with_columns(value=pl.when(stream).then(0.1).otherwise(pl.col("value")))
    )
    assert "no sign of inertia" in said(BY_ID["matrix"], same)


def test_a_curve_that_still_rises_at_its_end_has_not_settled(panel: ProfilePanel) -> None:
    assert "after 16 prompt tokens; at P = 128" in said(BY_ID["si1"], panel)
    late = with_measures(
        panel,
        lambda frame: frame.with_columns(
            value=pl.when(pl.col("metric") == "si1_p90").then(128.0).otherwise(pl.col("value"))
        ),
    )
    assert "the most that were measured" in said(BY_ID["si1"], late)


def test_the_union_is_read_off_at_small_batches(panel: ProfilePanel) -> None:
    text = said(BY_ID["union"], panel)
    at8 = 1 - 0.8 ** (8**0.9)
    assert f"{100 * at8:.1f} % ({100 * at8 - 1:.1f}–{100 * at8 + 1:.1f}) at B = 8" in text
    assert "share neurons" not in text or "share more neurons than independent ones" in text


def test_one_measured_row_is_enough_for_no_figure_to_fail(panel: ProfilePanel) -> None:
    """A figure whose other half is missing draws what there is or nothing; it never raises."""
    single = {
        "hu1": "pop=nat,r=0.2",
        "si1": "p=4,pop=nat,r=0.2",
        "si2_j": "pop=nat,r=0.2,rung=natural",
        "hu2_shuffled": "r=0.2",
        "union": "b=1,r=0.2",
        "overlap_w": "r=0.2,rung=repeat",
        "overlap_distance": "d=1,r=0.2",
    }
    for metric, where in single.items():
        for layer in (None, 0):
            row = Measure(metric=metric, layer=layer, kind="neuron", param=where, value=0.5, unit="1", n=1)
            alone = replace(panel, measures=tables.frame([row], Measure), probes={})
            for figure in ROWS:
                frame = figure.data(alone)
                if not frame.is_empty():
                    figure.draw(frame, {})
                    assert figure.caption(frame)


def test_gradients_say_what_their_intervals_allow(panel: ProfilePanel) -> None:
    assert "HU4 rises with the diversity of the history: 0.70 (0.680\u20130.720) from 0.40 on" in said(
        BY_ID["hu4"], panel
    )
    assert "above 0 for sure in 0 of 30 layers, below in 30" in said(BY_ID["m2"], panel)
    assert "against MOYU's root cause" in said(BY_ID["m2"], panel)
    above = with_measures(
        panel,
        lambda frame: frame.with_columns(
            value=pl.when(pl.col("metric").str.starts_with("m2")).then(-pl.col("value")).otherwise(pl.col("value")),
            metric=pl.col("metric").replace({"m2_low": "m2_high", "m2_high": "m2_low"}),
        ),
    )
    assert "over-activation as MOYU says" in said(BY_ID["m2"], above)
