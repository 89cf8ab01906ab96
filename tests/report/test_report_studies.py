"""Studies in the report: every panel drawn, verdicts and tallies, the same colour for a plan as elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import example_runs as example
import example_studies as studies
import polars as pl
import pytest

from actsparse.report.document import document
from actsparse.report.figures.study import caption, draw, looks_in
from actsparse.report.looks import PLAN_COLOURS
from actsparse.report.page import render
from actsparse.report.view import FigureView, ReportView, build_view
from actsparse.results import ClaimVerdict, PanelKind, StudyPanel
from actsparse.specs import ReportSpec


def by_title(view: ReportView) -> dict[str, FigureView]:
    return {figure.row.title: figure for figure in view.figures}


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


def test_every_panel_is_a_figure_or_a_table(view: ReportView) -> None:
    panels = [panel for study in view.studies for one in study.experiments for panel in one.panels]
    assert [panel.grid.title for panel in panels if panel.grid] == ["Trinity"]
    for title in ("Nll by donor", "Perplexity over length", "Recall by layer", "One layer at a time"):
        figure = by_title(view)[title]
        layout = figure.row.draw(figure.frame, view.looks).to_plotly_json()["layout"]
        assert layout["xaxis"]["title"]["text"]
        assert layout["yaxis"]["title"]["text"]


def test_captions_follow_the_numbers(view: ReportView) -> None:
    found = {title: plain(figure.caption) for title, figure in by_title(view).items()}
    assert found["Nll by donor"] == (
        "Lowest is oracle per token, 3.15 nats (3.09\u20133.21); highest random, 9.90 nats (9.84\u20139.96). "
        "n = 1 024 a point."
    )
    assert "At 128, compute_all is lowest, 23 (22.2\u201323.8), and zero highest" in found["Perplexity over length"]
    assert "1 point could not be measured." in found["Perplexity over length"]


def test_overlapping_extremes_are_not_called_an_order(tmp_path: Path) -> None:
    made, rows = studies.donors()
    close = [replace(row, value=4.0 + 0.01 * place, low=3.9, high=4.2) for place, row in enumerate(rows)]
    run = studies.study_run(tmp_path / "s", made=((made, close),))
    assert "their intervals overlap" in build_view(ReportSpec(runs=(run,))).figures[0].caption


def test_a_missing_value_is_a_gap_in_figures_and_a_dash_in_tables(view: ReportView) -> None:
    zero = by_title(view)["Perplexity over length"]
    drawn = zero.row.draw(zero.frame, view.looks)
    line = next(trace for trace in drawn.data if trace.name == "zero")
    assert line.y[-1] != line.y[-1]  # NaN
    grid = next(panel.grid for study in view.studies for one in study.experiments for panel in one.panels if panel.grid)
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in grid.rows}
    assert cells["RIDA"][1] == "\u2013"
    assert cells["TDA"][2] == "24 families"


def test_a_plan_keeps_its_colour_in_studies(view: ReportView) -> None:
    frame = by_title(view)["Perplexity at equal bytes"].frame
    own = looks_in(frame, view.looks)
    assert own["griffin"].colour == view.looks["griffin@0.5"].colour
    assert own["cats"].colour == view.looks["cats@0.25"].colour
    assert own["static:stat=griffin"].baseline
    assert len({own[name].colour for name in ("auto", "teal", "cats", "griffin")}) == 4
    policies = looks_in(by_title(view)["Perplexity over length"].frame, view.looks)
    assert {look.colour for look in policies.values()} <= set(PLAN_COLOURS)
    assert len({look.colour for look in policies.values()}) == 5


def test_one_method_of_two_models_shares_a_colour_and_differs_by_dash(view: ReportView) -> None:
    frame = by_title(view)["Perplexity at equal bytes"].frame.head(2)
    both = looks_in(frame.with_columns(series=frame["series"].replace("auto", "twin-relu: griffin")).vstack(
        frame.with_columns(series=frame["series"].replace("auto", "twin-silu: griffin"))
    ), view.looks)  # fmt: skip
    assert {look.colour for look in both.values()} == {view.looks["griffin@0.5"].colour}
    assert len({look.dash for look in both.values()}) == 2


def line_panel(**changes: Any) -> StudyPanel:
    wanted = {"name": "p", "title": "P", "kind": PanelKind.LINE, "x_title": "prompt tokens", "y_title": "milliseconds"}
    return StudyPanel(**(wanted | changes))


def rows_of(*rows: tuple[str, float, float, str]) -> pl.DataFrame:
    schema = {"series": pl.String, "x": pl.Float64, "value": pl.Float64, "unit": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(
        label=pl.lit(""), low=pl.lit(None, pl.Float64), high=pl.lit(None, pl.Float64), n=pl.lit(4)
    )


def test_lines_of_one_place_are_rows_with_the_colour_of_their_plan(view: ReportView) -> None:
    names = ("griffin@0.5: prefill", "griffin@0.5: decode", "cats@0.5: prefill")
    frame = rows_of(*((name, 64.0, 3.0 + place, "ms") for place, name in enumerate(names)))
    figure = draw(frame, view.looks, line_panel())
    assert [list(trace.y) for trace in figure.data] == [[name] for name in names]
    assert figure.layout.yaxis.title.text == "prompt tokens: 64"
    colours = [trace.marker.color for trace in figure.data]
    assert colours[0] == colours[1] == view.looks["griffin@0.5"].colour != colours[2]
    assert figure.data[0].marker.symbol != figure.data[1].marker.symbol


def test_two_units_are_never_drawn_on_one_axis(view: ReportView) -> None:
    frame = rows_of(("perplexity", 1.0, 30.0, "1"), ("perplexity", 2.0, 40.0, "1"), ("loss", 2.0, 0.3, "nats"))
    figure = draw(frame, view.looks, line_panel())
    assert [trace.name for trace in figure.data] == ["perplexity"]
    said = caption(frame, line_panel())
    assert "perplexity goes from 30 at 1 to 40 at 2" in said
    assert said.endswith("In the numbers too: loss.")


def test_long_axis_titles_stay_whole_and_log_axes_have_readable_ticks(view: ReportView) -> None:
    title = "distinct over all token ids so far, lower end of the bin"
    frame = rows_of(("a", 16.0, 90.0, "1"), ("a", 256.0, 2000.0, "1"))
    layout = draw(frame, view.looks, line_panel(x_title=title, log_x=True, log_y=True)).layout
    assert layout.xaxis.title.text == title
    assert {"100", "1000"} <= set(layout.yaxis.ticktext)
    assert {"20", "200"} <= set(layout.xaxis.ticktext)


def test_the_tally_counts_verdicts(view: ReportView) -> None:
    tallies = {study.study: study.tally for study in view.studies}
    assert tallies["pitfalls"] == "Of 2 claims tested, 1 holds here and 1 stays open."
    assert tallies["moyu"] == "Of 2 claims tested, 1 holds here and 1 does not."
    page = render(view)
    assert '<span class="badge fails">does not hold</span> <span class="badge">quick</span>' in page
    assert "actsparse evaluate --model smollm2 --study tda --quick" in page
    assert "--study moyu" not in page


def test_a_page_of_studies_alone_begins_with_them_and_names_what_is_missing_once(tmp_path: Path) -> None:
    page = render(build_view(ReportSpec(runs=(studies.study_run(tmp_path / "s"),))))
    places = [page.index(f'<section id="{name}"') for name in ("summary", "studies", "absent", "origins")]
    assert places == sorted(places)
    assert page.count("<section id=") == len(places)
    between = page[page.index("</section>") : page.index('<section id="studies"')]
    assert "Not" not in between
    said = page[places[2] : places[3]]
    assert "<b>where it is sparse</b>, <b>which neurons and heads</b>" in said
    assert "Sparsity by layer and kind" in said
    assert "--probes uncertainty</code>" in said


def test_json_holds_the_studies(view: ReportView) -> None:
    found = document(view)["studies"]
    donors = next(one for study in found for one in study["experiments"] if one["experiment"] == "M5")
    assert donors["verdict"] == ClaimVerdict.FAILS.value
    assert donors["figures"][0] in {figure["id"] for figure in document(view)["figures"]}


def test_a_study_alone_makes_a_report_and_hostile_text_stays_text(tmp_path: Path) -> None:
    made, rows = studies.donors()
    bad = example.HOSTILE
    hostile = replace(made, title=bad, claim=bad, conclusion=bad, notes=(bad,), settings={bad: bad}, experiment=bad)
    run = studies.study_run(
        tmp_path / "s", made=((hostile, [replace(row, experiment=bad, series=bad, label=bad) for row in rows]),)
    )
    page = render(build_view(ReportSpec(runs=(run,))))
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;img" in page


def test_two_models_are_told_apart(tmp_path: Path) -> None:
    other = replace(example.SMOLLM2, resolved="twins/relu", weights_sha256="77" * 32)
    runs = (studies.study_run(tmp_path / "a"), studies.study_run(tmp_path / "b", model=other))
    view = build_view(ReportSpec(runs=runs))
    assert {study.label for study in view.studies} == {"SmolLM2-135M-Instruct", "relu"}
    ids = [figure.id for figure in view.figures]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("table", ["studies.parquet", "studies.json"])
def test_an_unfinished_study_is_read_as_far_as_it_goes(tmp_path: Path, table: str) -> None:
    run = studies.study_run(tmp_path / "s", finish=False)
    (run / table).unlink()
    view = build_view(ReportSpec(runs=(run,)))
    assert any("incomplete" in notice.text for notice in view.notices)
