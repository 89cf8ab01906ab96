"""Complete runs as they are read back: one class a kind, tables as polars frames."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import polars as pl

from actsparse.errors import RunError
from actsparse.results import (
    DECODE,
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
    ThresholdPlan,
    ThroughputRow,
    TimingRow,
    TokenRow,
)
from actsparse.store import arrays, tables
from actsparse.store.codec import MAX_JSON_BYTES, decode
from actsparse.store.files import missing, plain_bytes, sha256_of
from actsparse.store.run import COMPLETE, DUMP, read_manifest


@dataclass(frozen=True)
class Run:
    """A complete run directory and its manifest."""

    path: Path
    manifest: Manifest
    kind: ClassVar[RunKind]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The run at `path`; raises RunError where it is missing, incomplete, damaged or of another kind."""
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.kind != cls.kind:
            raise RunError(
                f"{path} is a run of kind '{manifest.kind}', not '{cls.kind}'", f"give a {cls.kind} run directory"
            )
        for file in manifest.files:
            _check(path, file.path, file.bytes, file.sha256)
        return cls(path, manifest)

    def has(self, name: str) -> bool:
        """Whether a file belongs to the run: named by its manifest or, in a run at work, a plain file that is there."""
        if self.manifest.status == COMPLETE:
            return any(file.path == name for file in self.manifest.files)
        return (self.path / name).is_file() and not (self.path / name).is_symlink()

    def file(self, name: str) -> Path:
        """The path of a file of the run; raises RunError where it does not belong to it."""
        if not self.has(name):
            raise missing(self.path / name)
        return self.path / name

    def _bytes(self, name: str) -> bytes:
        # lines of JSON are bounded one by one
        return plain_bytes(self.file(name), None if name.endswith(".jsonl") else MAX_JSON_BYTES)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.manifest.warnings

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The document that `--json` printed when the run was made."""
        return decode(self._bytes("summary.json"), dict[str, Any], str(self.path / "summary.json"))


@dataclass(frozen=True)
class ProfileRun(Run):
    """What `profile` found: measures, neurons, heads, histograms."""

    kind = RunKind.PROFILE

    @cached_property
    def all_measures(self) -> pl.DataFrame:
        """Every row of `measures.parquet`, of whatever phase."""
        return tables.read(self.file("measures.parquet"), Measure)

    @cached_property
    def measures(self) -> pl.DataFrame:
        """The rows of prefill, and of the probes."""
        return self.all_measures.filter(~_of_decode())

    @cached_property
    def decode_measures(self) -> pl.DataFrame:
        """The rows of what the model wrote itself (`--decode N`); none without it. `param` still names the phase."""
        return self.all_measures.filter(_of_decode())

    @cached_property
    def decode_neurons(self) -> pl.DataFrame:
        """As `neurons`, over the tokens that the model wrote itself; raises RunError without `--decode N`."""
        return tables.read(self.file("neurons_decode.parquet"), NeuronRow)

    @cached_property
    def decode_heads(self) -> pl.DataFrame:
        """As `heads`, over the tokens that the model wrote itself; raises RunError without `--decode N`."""
        return tables.read(self.file("heads_decode.parquet"), HeadRow)

    @property
    def dump(self) -> tuple[Path, ...]:
        """The shards of raw activations that `--dump` wrote, in order."""
        return tuple(self.path / file.path for file in self.manifest.files if DUMP.fullmatch(file.path))

    @cached_property
    def neurons(self) -> pl.DataFrame:
        return tables.read(self.file("neurons.parquet"), NeuronRow)

    @cached_property
    def heads(self) -> pl.DataFrame:
        return tables.read(self.file("heads.parquet"), HeadRow)

    @cached_property
    def histograms(self) -> dict[str, Any]:
        """Numpy arrays `layers.<i>.<kind>.counts` and `.edges`."""
        return arrays.read(self.file("histograms.safetensors"))

    @cached_property
    def coactivation(self) -> dict[str, Any]:
        """Numpy arrays `layers.<i>.neurons` and `layers.<i>.counts`, and the number of `tokens`."""
        return arrays.read(self.file("coactivation.safetensors"))

    @cached_property
    def probes(self) -> dict[str, Any]:
        """Numpy arrays of `probes.safetensors`: the matrices of the 2x2."""
        return arrays.read(self.file("probes.safetensors"))


@dataclass(frozen=True)
class PlanRun(Run):
    """What `threshold` derived: a plan and the file of its tensors."""

    kind = RunKind.PLAN

    @cached_property
    def plan(self) -> ThresholdPlan:
        return decode(self._bytes("plan.json"), ThresholdPlan, str(self.path / "plan.json"))


@dataclass(frozen=True)
class EvalRun(Run):
    """What `evaluate` measured: results, per-token and per-repetition tables, generations."""

    kind = RunKind.EVAL

    @cached_property
    def results(self) -> pl.DataFrame:
        return tables.read(self.file("results.parquet"), EvalRow)

    @cached_property
    def tokens(self) -> pl.DataFrame:
        return tables.read(self.file("tokens.parquet"), TokenRow)

    @cached_property
    def items(self) -> pl.DataFrame:
        """Every item of every task under every plan; empty where no task was asked for."""
        name = "items.parquet"
        return tables.read(self.file(name), TaskItemRow) if self.has(name) else tables.frame([], TaskItemRow)

    @cached_property
    def timing(self) -> pl.DataFrame:
        return tables.read(self.file("timing.parquet"), TimingRow)

    @cached_property
    def throughput(self) -> pl.DataFrame:
        """Throughput runs; empty where none was asked for."""
        name = "throughput.parquet"
        return tables.read(self.file(name), ThroughputRow) if self.has(name) else tables.frame([], ThroughputRow)

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        lines = self._bytes("generations.jsonl").splitlines()
        return tuple(decode(line, Generation, str(self.path / "generations.jsonl")) for line in lines)


@dataclass(frozen=True)
class StudyRun(Run):
    """What the experiments of a study found: one long table, and what each experiment concludes."""

    kind = RunKind.STUDY

    @cached_property
    def rows(self) -> pl.DataFrame:
        return tables.read(self.file("studies.parquet"), StudyRow)

    @cached_property
    def experiments(self) -> tuple[StudyExperiment, ...]:
        return decode(self._bytes("studies.json"), tuple[StudyExperiment, ...], str(self.path / "studies.json"))


def _of_decode() -> pl.Expr:
    return pl.col("param").str.split(",").list.contains(f"phase={DECODE}")


def open_any(path: Path) -> ProfileRun | PlanRun | EvalRun | StudyRun:
    """The run at `path`, whatever its kind."""
    classes = {
        RunKind.PROFILE: ProfileRun,
        RunKind.PLAN: PlanRun,
        RunKind.EVAL: EvalRun,
        RunKind.STUDY: StudyRun,
    }
    return classes[read_manifest(path).kind].open(path)


def _check(run: Path, name: str, size: int, sha256: str) -> None:
    path = run / name
    if Path(name).name != name or path.is_symlink():
        raise RunError(f"the manifest of {run} names a file outside it: {name}", "do not use this run")
    try:
        whole = path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise RunError(f"{path} is missing or damaged", "repeat the command that made the run with --force")
