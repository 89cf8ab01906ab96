"""The other renderings of the view: terminal, JSON, single figures; and the imports of the package."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from actsparse.errors import ActsparseError
from actsparse.report.document import document
from actsparse.report.export import csv_of, export_figures
from actsparse.report.figures.labels import Mark, place_labels
from actsparse.report.text import sparkline, summary
from actsparse.report.view import ReportView, build_view
from actsparse.specs import ReportSpec


def printed(view: ReportView, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    console.print(summary(view))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_twin_holds_verdicts_plans_and_sparklines(view: ReportView) -> None:
    text = printed(view, 160)
    for part in (
        "GRIFFIN at 50\u202f% of neurons",
        "static:stat=griffin@0.5",
        "1.27×",
        "▁",
        "M5 ",
        "does not hold",
        "HU1",
    ):
        assert part in text


def test_the_terminal_twin_obeys_nothing_from_outside(hostile: tuple[Path, ...]) -> None:
    """Rich writes its own colour codes; those of a plan's name stand there as signs, and its markup as text."""
    text = printed(build_view(ReportSpec(runs=hostile)))
    assert "␛[31mred" in text
    assert "\x1b[31mred" not in text
    assert "\u202e" not in text
    assert "<b>bold</b>" in text.replace("\n", "")


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([]) == ""


def test_the_document_is_json_with_every_figures_numbers(view: ReportView) -> None:
    found = json.loads(json.dumps(document(view), allow_nan=False))
    assert {"verdicts", "cards", "figures", "warnings", "runs", "not_measured", "tables"} <= set(found)
    figure = next(figure for figure in found["figures"] if figure["id"] == "cett-layers-0")
    assert len(figure["columns"]["layer"]) == 90
    assert figure["caption"].startswith("Mean sparsity over 30 layers")


def test_figures_are_written_one_by_one(view: ReportView, tmp_path: Path) -> None:
    paths = export_figures(view, tmp_path / "figures")
    assert all(path.exists() for path in paths)
    csv = pl.read_csv(tmp_path / "figures" / "kl-0.csv")
    assert csv["plan"][0] == "griffin@0.25"
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".html", ".csv"}
    page = (tmp_path / "figures" / "kl-0.html").read_text()
    assert "src=" not in re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert "default-src &#39;none&#39;" in page
    assert page.count('data-figure="') == 1
    assert "How to read this: The mean KL divergence" in page
    with pytest.raises(ActsparseError, match="exists"):
        export_figures(view, tmp_path / "figures")
    export_figures(view, tmp_path / "figures", force=True)


def test_hostile_names_stay_text_in_single_figures(hostile: tuple[Path, ...], tmp_path: Path) -> None:
    for path in export_figures(build_view(ReportSpec(runs=hostile)), tmp_path / "figures"):
        if path.suffix == ".html":
            assert "<img" not in path.read_text()


def test_csv_cannot_carry_a_formula() -> None:
    frame = pl.DataFrame({"plan": ["=cmd()", "a,b", "\x1b["], "value": [1.0, None, 2.0]})
    assert csv_of(frame) == 'plan,value\n\'=cmd(),1.0\n"a,b",\n␛[,2.0\n'


def test_labels_keep_out_of_each_others_way() -> None:
    marks = [Mark(100, 100, "griffin@0.5", 60, 140, 90, 110), Mark(104, 100, "cats@0.5", 104, 104, 100, 100)]
    first, second = place_labels(marks, width=400, height=300)
    assert first != second
    at_edge = place_labels([Mark(395, 150, "a long label", 395, 395, 150, 150)], width=400, height=300)
    assert "left" in at_edge[0]


def test_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, actsparse.report.build, actsparse.report.text, actsparse.report.document, actsparse.report.export;"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
