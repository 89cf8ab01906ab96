"""Several models in one report: drawn together where it makes sense, said where it does not."""

from dataclasses import replace
from pathlib import Path

import example_runs as example
import pytest
from example_evals import ExamplePlan

from actsparse.report.view import FigureView, ReportView, build_view
from actsparse.specs import ReportSpec


@pytest.fixture(scope="module")
def both(pair: tuple[Path, ...]) -> ReportView:
    return build_view(ReportSpec(runs=pair))


def figure(view: ReportView, name: str) -> FigureView:
    return next(figure for figure in view.figures if figure.id == name)


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ").replace("\u2212", "-")


def test_models_share_a_frame_over_relative_depth(both: ReportView) -> None:
    found = figure(both, "together-sparsity-0")
    assert found.frame["model"].unique(maintain_order=True).to_list() == ["SmolLM2-135M-Instruct", "relu"]
    assert found.frame.group_by("model").len()["len"].sort().to_list() == [12, 30]
    assert (found.frame["depth"].min(), found.frame["depth"].max()) == (0.0, 1.0)
    assert "Mean over layers at CETT 0.2: SmolLM2-135M-Instruct" in plain(found.caption)
    assert len(found.row.draw(found.frame, both.looks).data) == 2


def test_quality_is_compared_as_a_ratio_to_each_models_dense(both: ReportView) -> None:
    found = figure(both, "together-quality-0")
    rows = found.frame.filter(plan="cats@0.5")["ratio"].to_list()
    assert rows == pytest.approx([27.8 / 22.5, 31.3 / 31.0])
    assert "griffin@0.5 costs 3.93× on SmolLM2-135M-Instruct and 1.29× on relu" in plain(found.caption)
    assert "of 2 plans on both, 2 lose less on relu" in plain(found.caption)
    drawn = found.row.draw(found.frame, both.looks)
    colours = {trace.line.color for trace in drawn.data if (trace.name or "").startswith("griffin,")}
    dashes = {trace.line.dash for trace in drawn.data if (trace.name or "").startswith("griffin,")}
    assert colours == {both.looks["griffin@0.5"].colour}
    assert len(dashes) == 2


def test_a_plan_has_one_colour_in_both_models(both: ReportView) -> None:
    frontiers = [figure for figure in both.figures if figure.row.id == "frontier"]
    colours = [
        next(trace.marker.color for trace in one.row.draw(one.frame, both.looks).data if trace.name == "griffin@0.5")
        for one in frontiers
    ]
    assert len(frontiers) == 2
    assert colours[0] == colours[1]


def test_what_does_not_compare_is_said(both: ReportView) -> None:
    said = " ".join(notice.text for notice in both.notices)
    assert "another model (relu)" in said
    assert "perplexities and milliseconds do not" in said


def test_one_model_has_no_section_of_comparison(view: ReportView) -> None:
    assert "compare" not in {section.id for section in view.sections}


def test_models_without_a_shared_method_share_no_quality_figure(tmp_path: Path) -> None:
    other = replace(example.SMOLLM2, resolved="twins/relu", weights_sha256="77" * 32)
    left_out = ("tokens", "timing", "generations", "throughput", "tasks")
    runs = (
        example.eval_run(tmp_path / "a", plans=(ExamplePlan(plan="griffin@0.5", ppl=40.0),), leave_out=left_out),
        example.eval_run(
            tmp_path / "b", plans=(ExamplePlan(plan="cats@0.5", ppl=30.0),), model=other, leave_out=left_out
        ),
    )  # fmt: skip
    ids = {figure.id for figure in build_view(ReportSpec(runs=runs)).figures}
    assert "together-quality-0" not in ids


def test_the_models_own_tokens_are_drawn_beside_the_prompt(view: ReportView) -> None:
    found = figure(view, "decode-phase-0")
    assert found.frame["phase"].unique().sort().to_list() == ["decode", "prefill"]
    assert "points in layer" in found.caption
