"""`report`: what it writes, and what it refuses with a hint and nothing half-written."""

import hashlib
import json
import os
from pathlib import Path

import example_runs as example
import polars as pl
import pytest

from actsparse.errors import ActsparseError, RunError
from actsparse.report.build import report
from actsparse.specs import ReportSpec


def refused(spec: ReportSpec) -> ActsparseError:
    with pytest.raises(ActsparseError) as caught:
        report(spec)
    assert caught.value.hint
    assert caught.value.exit_code == 1
    return caught.value


def test_report_writes_one_file(runs: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.html"
    assert report(ReportSpec(runs=runs, output=output)) == output
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_an_existing_file_needs_force(runs: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("mine")
    assert "--force" in refused(ReportSpec(runs=runs, output=output)).hint
    assert output.read_text() == "mine"
    report(ReportSpec(runs=runs, output=output, force=True))
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_no_runs(tmp_path: Path) -> None:
    assert "no runs" in refused(ReportSpec(runs=(), output=tmp_path / "r.html")).what


@pytest.mark.parametrize("name", ["absent", "file", "empty"])
def test_what_is_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    error = refused(ReportSpec(runs=(tmp_path / name,), output=tmp_path / "r.html"))
    assert isinstance(error, RunError)
    assert name in error.what
    assert not (tmp_path / "r.html").exists()


def test_a_run_of_another_schema(tmp_path: Path) -> None:
    run = example.plan_run(tmp_path / "plan")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    error = refused(ReportSpec(runs=(run,), output=tmp_path / "r.html"))
    assert "schema 99" in error.what
    assert "--force" in error.hint


def test_a_run_older_than_a_column_is_still_drawn(tmp_path: Path) -> None:
    run = example.profile_run(tmp_path / "p", leave_out=("measures", "heads", "histograms", "probes", "coactivation"))
    table = run / "neurons.parquet"
    pl.read_parquet(table).drop("expert", "tokens").write_parquet(table)
    manifest = json.loads((run / "manifest.json").read_text())
    entry = next(file for file in manifest["files"] if file["path"] == table.name)
    entry |= {"bytes": table.stat().st_size, "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    (run / "manifest.json").write_text(json.dumps(manifest))
    output = report(ReportSpec(runs=(run,), output=tmp_path / "r.html"))
    assert 'id="figure-firing-rates-0"' in output.read_text()


def test_a_damaged_table_of_a_complete_run(tmp_path: Path) -> None:
    run = example.eval_run(tmp_path / "eval", plans=example.PLANS[:1])
    (run / "results.parquet").write_bytes(b"broken")
    assert "results.parquet" in refused(ReportSpec(runs=(run,), output=tmp_path / "r.html")).what


def test_a_directory_as_output(runs: tuple[Path, ...], tmp_path: Path) -> None:
    assert "report.html" in refused(ReportSpec(runs=runs, output=tmp_path)).hint


def test_an_output_that_cannot_be_written(runs: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    error = refused(ReportSpec(runs=runs, output=tmp_path / "file" / "report.html"))
    assert "cannot be written" in error.what


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(runs: tuple[Path, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(ReportSpec(runs=runs, output=tmp_path / "report.html")).what
