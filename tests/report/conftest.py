"""Example runs, made once a session."""

from dataclasses import replace
from pathlib import Path

import example_runs as example
import pytest
from example_evals import ExamplePlan
from example_studies import study_run

from actsparse.report.view import ReportView, build_view
from actsparse.specs import ReportSpec


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A profile, a plan, an evaluation and a study of one model."""
    root = tmp_path_factory.mktemp("runs")
    return (
        example.profile_run(root / "profile-aa"),
        example.plan_run(root / "plan-bb"),
        example.eval_run(root / "eval-cc", warnings=("byte figures count 4 bytes a weight",)),
        study_run(root / "study-dd"),
    )


@pytest.fixture(scope="session")
def view(runs: tuple[Path, ...]) -> ReportView:
    return build_view(ReportSpec(runs=runs))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Profiles and evaluations of a SwiGLU and a ReLU model."""
    root = tmp_path_factory.mktemp("pair")
    relu = replace(example.SMOLLM2, resolved="twins/relu", activation="relu", layers=12, weights_sha256="77" * 32)
    plans = (ExamplePlan(plan="griffin@0.5", ppl=40.0, speed=1.2), ExamplePlan(plan="cats@0.5", ppl=31.3, speed=1.12))
    return (
        example.profile_run(root / "profile-swiglu"),
        example.profile_run(root / "profile-relu", model=relu, relu=True),
        example.eval_run(root / "eval-swiglu"),
        example.eval_run(root / "eval-relu", model=relu, dense=31.0, plans=plans),
    )


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Runs in which every text from outside tries to be more than text."""
    root = tmp_path_factory.mktemp("hostile")
    bad = example.HOSTILE
    model = replace(example.SMOLLM2, requested=bad, resolved=bad, weights_sha256="66" * 32, layers=3)
    text = replace(example.CORPUS, source=bad)
    plans = (ExamplePlan(plan=bad, ppl=30.0, speed=1.1), ExamplePlan(plan="=cmd()|x@0.5", ppl=22.6, speed=1.2))
    return (
        example.profile_run(root / "profile", model=model, warnings=(bad,)),
        example.eval_run(
            root / "eval",
            model=model,
            plans=plans,
            texts=(text, replace(text, role="calibration", blocks=(2, 6))),
            warnings=(bad,),
            prompt=bad,
            continuation=bad,
        ),
    )
