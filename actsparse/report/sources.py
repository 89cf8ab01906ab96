"""The runs of a report as they are read.

Complete ones are checked against their manifest, unfinished ones are read as far as they go.
"""

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import polars as pl

from actsparse.errors import RunError
from actsparse.report.wording import one_line
from actsparse.results import (
    SCHEMA_VERSION,
    EvalRow,
    Generation,
    HeadRow,
    Manifest,
    Measure,
    NeuronRow,
    RunKind,
    StudyExperiment,
    StudyRow,
    TaskItemRow,
    ThroughputRow,
    TimingRow,
    TokenRow,
)
from actsparse.store import tables
from actsparse.store.codec import MAX_JSON_BYTES, decode
from actsparse.store.files import plain_bytes
from actsparse.store.run import MANIFEST, UNFINISHED, read_draft
from actsparse.store.runs import EvalRun, PlanRun, ProfileRun, StudyRun, open_any

RECORDS: dict[str, type] = {
    "measures": Measure,
    "neurons": NeuronRow,
    "heads": HeadRow,
    "results": EvalRow,
    "tokens": TokenRow,
    "items": TaskItemRow,
    "timing": TimingRow,
    "throughput": ThroughputRow,
    "studies": StudyRow,
}
_CLASSES = {RunKind.PROFILE: ProfileRun, RunKind.PLAN: PlanRun, RunKind.EVAL: EvalRun, RunKind.STUDY: StudyRun}

# Tables that a run class calls by another name than their file.
_ATTRIBUTES = {"studies": "rows"}

AnyRun = ProfileRun | PlanRun | EvalRun | StudyRun


@dataclass(frozen=True)
class Source:
    """A run of the report: its letter, whether it is complete, and what of it could not be read."""

    letter: str
    run: AnyRun
    complete: bool
    unreadable: list[str]

    @property
    def manifest(self) -> Manifest:
        return self.run.manifest

    @property
    def kind(self) -> RunKind:
        return self.manifest.kind

    @property
    def model_name(self) -> str:
        """The model's resolved name, short and clean."""
        model = self.manifest.model
        return one_line(model.resolved).rstrip("/").split("/")[-1] if model else "unknown model"

    def table(self, name: str) -> pl.DataFrame:
        """The table `name` with NaN as null; empty where the run has none.

        Raises RunError where a complete run's table is damaged; of an unfinished run it is left out and noted.
        """
        if not self.run.has(f"{name}.parquet"):
            return pl.DataFrame(schema=tables.schema_of(RECORDS[name]))
        found = self._read(name)
        return found.fill_nan(None) if found is not None else pl.DataFrame(schema=tables.schema_of(RECORDS[name]))

    def decode_measures(self) -> pl.DataFrame:
        """The measures over the tokens that the model wrote itself; empty where the profile has none."""
        if not self.run.has("measures.parquet"):
            return pl.DataFrame(schema=tables.schema_of(Measure))
        found = self._read("decode_measures")
        return found.fill_nan(None) if found is not None else pl.DataFrame(schema=tables.schema_of(Measure))

    def arrays(self, name: str) -> dict[str, Any]:
        """Arrays of `<name>.safetensors` by name; none where the run has none."""
        if not self.run.has(f"{name}.safetensors"):
            return {}
        return self._read(name) or {}

    def generations(self) -> tuple[Generation, ...]:
        """Continuations in the order of the file."""
        if not self.run.has("generations.jsonl"):
            return ()
        return self._read("generations") or ()

    def summary(self) -> dict[str, Any]:
        """The document of `--json`; empty where the run has none."""
        if not self.run.has("summary.json"):
            return {}
        return self._read("summary") or {}

    def experiments(self) -> tuple[StudyExperiment, ...]:
        """What each experiment of a study concludes; none where the run has not written it."""
        if not self.run.has("studies.json"):
            return ()
        return self._read("experiments") or ()

    def vocabulary(self) -> dict[int, str]:
        """The text of the token ids in `tokens.parquet`, where the run kept it (`vocabulary.json`)."""
        path = self.run.path / "vocabulary.json"
        if not self.run.has(path.name):
            return {}
        try:
            return decode(plain_bytes(path, MAX_JSON_BYTES), dict[int, str], str(path))
        except RunError as error:
            self.unreadable.append(error.what)
            return {}

    def _read(self, name: str) -> Any:
        try:
            return getattr(self.run, _ATTRIBUTES.get(name, name))
        except (RunError, ValueError) as error:
            if self.complete:
                raise error if isinstance(error, RunError) else _damaged(self.run.path, name, error) from None
            self.unreadable.append(str(error).split("\n")[0])
            return None


def read_sources(paths: tuple[Path, ...]) -> tuple[Source, ...]:
    """The runs at `paths`, lettered in order; raises RunError where one is no run or of another schema."""
    if not paths:
        raise RunError(
            "no runs to report on", "name one or more run directories: actsparse report runs/MODEL/eval-123456"
        )
    unique = list(dict.fromkeys(path.resolve() for path in paths))
    asked = {path.resolve(): path for path in reversed(paths)}
    return tuple(_source(asked[path], _letter(place)) for place, path in enumerate(unique))


def _source(path: Path, letter: str) -> Source:
    unfinished = (path / UNFINISHED).exists() and not (path / MANIFEST).exists()
    if unfinished:
        draft = read_draft(path)
        run: AnyRun = _CLASSES[draft.kind](path, draft)
    else:
        run = open_any(path)
    if run.manifest.schema_version != SCHEMA_VERSION:
        raise RunError(
            f"{path} was written under schema {run.manifest.schema_version}; this version reads {SCHEMA_VERSION}",
            f"repeat it with this version: {' '.join(run.manifest.provenance.command)} --force",
        )
    return Source(letter, run, not unfinished, [])


def _letter(place: int) -> str:
    return ascii_uppercase[place] if place < len(ascii_uppercase) else f"R{place + 1}"


def _damaged(path: Path, name: str, error: Exception) -> RunError:
    return RunError(f"{name} of {path} is damaged: {error}", "repeat the command that made the run with --force")
