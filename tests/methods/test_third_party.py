"""The example package of the docs, installed as a user would install it, is a method like any other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FFN, LAYERS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "actsparse-recent"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example in a folder of its own, with its entry points."""
    folder = tmp_path_factory.mktemp("site")
    # a build leaves files beside its sources
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / EXAMPLE.name)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(installed)))}
    return subprocess.run(
        [sys.executable, "-m", "actsparse", *argv], capture_output=True, text=True, env=environment, cwd=installed
    )


def test_it_is_listed_with_its_options(installed: Path) -> None:
    done = run(installed, "methods", "recent", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["method"], found["decides"]) == ("recent", "end of prefill")
    assert found["options"]["last"] == {"type": "int", "default": 16, "values": []}


def test_it_is_evaluated_beside_its_controls(installed: Path, tiny_folder, corpus_file: Path) -> None:
    plan = "recent:last=4,compensate=true@0.5"
    where = ["--model", str(tiny_folder("llama")), "--corpus", str(corpus_file), "-n", "1", "--block-length", "24"]
    done = run(
        installed,
        "evaluate",
        *where,
        "--plan",
        plan,
        "--timing-pairs",
        "0",
        "--max-new-tokens",
        "2",
        "-o",
        "run",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = {one["plan"]: one for one in json.loads(done.stdout)["plans"]}
    assert found[plan]["sparsity"]["neuron_frac"] == pytest.approx(0.5)
    assert "static@0.5" in found
    wrong = run(installed, "evaluate", *where, "--plan", "recent:lst=4@0.5")
    assert wrong.returncode == 1
    assert "did you mean 'last'?" in wrong.stderr


def test_its_mask_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from actsparse_recent import Recent  # pyright: ignore[reportMissingImports]

    from actsparse.methods.base import Budget
    from actsparse.pipelines.calibration import TextCalibration

    method = Recent(last=3)
    nothing = TextCalibration((FFN,) * LAYERS, lambda: pytest.fail("no text"), lambda: pytest.fail("no text"))
    fit = method.fit(nothing, Budget(drop=0.75))
    gate = method.gates(1, fit).neurons
    rows = torch.randn(9, FFN, generator=torch.Generator().manual_seed(1))
    statistic = gate.statistic()
    statistic.add(rows[:5])
    statistic.add(rows[5:])
    naive = (rows[-3:].abs() / rows[-3:].norm(dim=1, keepdim=True)).mean(dim=0).topk(FFN // 4).indices
    assert gate.rule(statistic.value()).nonzero().squeeze(1).tolist() == sorted(naive.tolist())


def test_the_document_shows_the_package_as_it_is() -> None:
    code = (EXAMPLE / "actsparse_recent" / "__init__.py").read_text()
    document = (ROOT / "docs" / "add-a-method.md").read_text()
    assert code[code.index("class LastTokens") :].strip() in document
