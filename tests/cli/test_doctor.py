"""`actsparse doctor`: what it finds here, and that it says so when something is broken."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from actsparse.cli.app import main
from actsparse.pipelines import doctor as module
from actsparse.pipelines.doctor import Check, Health, doctor


def names(document: dict) -> dict[str, dict]:
    return {check["name"]: check for check in document["checks"]}


def test_this_machine_is_well_and_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = names(document)
    assert document["ok"] is True
    assert document["bandwidth_gb_per_s"] > 0.1
    assert {"actsparse", "python", "torch", "transformers", "cpu", "cpu operators", "record", "sparse decode"} <= set(
        found
    )
    assert found["record"]["value"] == "5632 neurons of demo"
    assert "differs from the masked path by" in found["sparse decode"]["value"]
    assert all(check["hint"] for check in document["checks"] if check["health"] != "ok")


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-test, which takes seconds."""
    monkeypatch.setattr(module, "_self_test", lambda device, progress: ([], None))


def test_a_package_that_is_missing_is_broken_and_an_extra_is_not(
    untested: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: None if name == "lm_eval" else there(name))
    assert main(["doctor", "--json"]) == 0
    found = names(json.loads(capsys.readouterr().out))
    assert found["lm_eval"]["health"] == "note"
    assert "actsparse[eval]" in found["lm_eval"]["hint"]
    monkeypatch.setattr(module, "_installed", lambda name: None if name == "polars" else there(name))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "polars                  not installed  [broken: pip install polars]" in said
    assert "something is broken" in said


def test_a_cache_that_cannot_be_written_is_noted(
    untested: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACTSPARSE_HOME", str(tmp_path / "file"))
    found = {check.name: check for check in doctor("cpu").checks}["cache (ACTSPARSE_HOME)"]
    assert found.health is Health.NOTE
    assert "cannot be written" in found.value


def test_a_device_that_is_not_there_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:99", "--json"]) == 1
    found = names(json.loads(capsys.readouterr().out))["failed"]
    assert found["health"] == "broken"
    assert "cuda:99" in found["value"]


@pytest.mark.parametrize("failing", ["_records", "_decodes"])
def test_a_self_test_that_fails_is_broken_whatever_it_says(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    well = Check(group="self-test", name="x", value="y")
    for name in ("_records", "_decodes"):
        monkeypatch.setattr(module, name, lambda folder, device: well)
    assert doctor("cpu").ok
    monkeypatch.setattr(module, failing, lambda folder, device: replace(well, health=Health.BROKEN))
    assert not doctor("cpu").ok

    def raising(folder: Path, device: str) -> Check:
        raise ZeroDivisionError("no numbers")

    monkeypatch.setattr(module, failing, raising)
    found = doctor("cpu")
    assert not found.ok
    assert found.checks[-1].value == "ZeroDivisionError: no numbers"
