"""Study and exploit activation sparsity in large language models.

The four verbs of the command line are functions here: `profile(spec)`, `threshold(spec)`, `evaluate(spec)` and
`report(spec)`; `study(spec)` runs a paper's experiments, `sparsify(model, plan)` makes a loaded model decode sparsely,
and `generate(model, plan, ids)` writes text by the fastest engine. Importing this package loads neither torch nor
transformers: every name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ActsparseError": "errors",
    "DataSpec": "specs",
    "EvalSpec": "specs",
    "ModelSpec": "specs",
    "ProfileSpec": "specs",
    "ReportSpec": "specs",
    "StudySpec": "specs",
    "ThresholdSpec": "specs",
    "EvalRun": "store.runs",
    "PlanRun": "store.runs",
    "ProfileRun": "store.runs",
    "StudyRun": "store.runs",
    "profile": "pipelines.profile",
    "threshold": "pipelines.threshold",
    "evaluate": "pipelines.evaluate",
    "study": "pipelines.studies.run",
    "report": "report.build",
    "sparsify": "pipelines.sparsify",
    "generate": "pipelines.generate",
    "Generated": "pipelines.generate",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from actsparse.errors import ActsparseError as ActsparseError
    from actsparse.pipelines.evaluate import evaluate as evaluate
    from actsparse.pipelines.generate import Generated as Generated
    from actsparse.pipelines.generate import generate as generate
    from actsparse.pipelines.profile import profile as profile
    from actsparse.pipelines.sparsify import sparsify as sparsify
    from actsparse.pipelines.studies.run import study as study
    from actsparse.pipelines.threshold import threshold as threshold
    from actsparse.report.build import report as report
    from actsparse.specs import DataSpec as DataSpec
    from actsparse.specs import EvalSpec as EvalSpec
    from actsparse.specs import ModelSpec as ModelSpec
    from actsparse.specs import ProfileSpec as ProfileSpec
    from actsparse.specs import ReportSpec as ReportSpec
    from actsparse.specs import StudySpec as StudySpec
    from actsparse.specs import ThresholdSpec as ThresholdSpec
    from actsparse.store.runs import EvalRun as EvalRun
    from actsparse.store.runs import PlanRun as PlanRun
    from actsparse.store.runs import ProfileRun as ProfileRun
    from actsparse.store.runs import StudyRun as StudyRun


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'actsparse' has no attribute '{name}'")
    return getattr(import_module(f"actsparse.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
