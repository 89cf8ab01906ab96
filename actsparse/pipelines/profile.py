"""`profile`: record a model's activations on texts and write what was found."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from actsparse.core.cett import CettSolution
from actsparse.core.mask_rules import CETT_TARGET, MaskKind, mask_kinds, mask_rules
from actsparse.core.reservoir import capacity
from actsparse.data.network import network
from actsparse.data.sequences import Sequences
from actsparse.data.texts import TextReader
from actsparse.errors import DataError, ModelError
from actsparse.models.load import LoadedModel, load
from actsparse.models.sites import Ffn
from actsparse.models.taps import IN_EXPERTS
from actsparse.pipelines.continuation import continuing, prompts_of
from actsparse.pipelines.distributed import Team, local_device, team
from actsparse.pipelines.dump import Dump, write_dump
from actsparse.pipelines.halving import fitting
from actsparse.pipelines.identity import data_identity, model_identity
from actsparse.pipelines.probes.names import CHEAP, chosen, probe_names
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.run import run_probes
from actsparse.pipelines.probes.text import ProbeTexts, probe_texts
from actsparse.pipelines.profile_files import Phase, write_measures, write_phase
from actsparse.pipelines.profile_state import ProfileState
from actsparse.pipelines.progress import Progress, Silent, describe
from actsparse.pipelines.recording import Feed, Shards, not_finite, record_sequences
from actsparse.results import DECODE, PREFILL, RunKind
from actsparse.specs import ProfileSpec
from actsparse.store.files import SHARDS
from actsparse.store.fingerprint import asked
from actsparse.store.run import RunRequest, RunWriter, open_run
from actsparse.store.runs import ProfileRun

# What rank 0 tells the others before anything is recorded: the run is complete; it cannot be opened.
COMPLETE, REFUSED = "complete", "refused"


def profile(spec: ProfileSpec, progress: Progress | None = None) -> ProfileRun:
    """Record what `spec` asks for; returns the complete run, new or up to date.

    Under `torchrun` every process records a share of the batches; all return the run that rank 0 writes. Raises
    ActsparseError where model, text or output cannot be used as asked.
    """
    with network(offline=spec.model.offline), team(spec.model.device) as crew:
        listener = (progress or Silent()) if crew.leads else Silent()
        job = Job.of(spec, crew, listener)
        path = _lead(job) if crew.leads else _follow(job)
        crew.wait()
    return ProfileRun.open(path)


@dataclass(frozen=True)
class Job:
    """What is recorded: a model, its texts, the layers, and with whom."""

    spec: ProfileSpec
    loaded: LoadedModel
    sequences: Sequences
    continued: Sequences | None
    probed: ProbeTexts | None
    layers: tuple[int, ...]
    crew: Team
    progress: Progress

    @classmethod
    def of(cls, spec: ProfileSpec, crew: Team, progress: Progress) -> "Job":
        """Load and read what `spec` names; raises ActsparseError where something does not fit."""
        asked_of = replace(spec.model, device=local_device(spec.model.device))
        spec = replace(spec, model=asked_of, probes=probe_names(spec.probes), masks=mask_kinds(spec.masks))
        loaded = load(spec.model, progress.note)
        progress.detail(describe(loaded.record, str(loaded.device)))
        reader = TextReader(spec.data, loaded.tokenizer, loaded.record.max_positions, progress.note)
        sequences = reader.profile_sequences()
        layers = chosen_layers(spec.layers, loaded)
        sink = spec.data.sink_tokens
        if not any(len(ids) > sink for ids in sequences.ids):
            raise DataError(f"no token is left after the first {sink} of each sequence", "give longer texts")
        if spec.dump is not None:
            chosen_layers(spec.dump.layers, loaded, "--dump")
            Dump.of(spec.dump, loaded, layers, sequences)
        continued = None
        if spec.decode:
            continued = prompts_of(reader, sequences, spec.decode, loaded.record.max_positions)
        _check_experts(spec, loaded, layers, progress)
        spec, probed = _with_probes(spec, reader, loaded, progress)
        return cls(spec, loaded, sequences, continued, probed, layers, crew, progress)

    def record(self, phase: str, folder: Path) -> ProfileState:
        """This process's share of a phase; in rank 0 everything."""
        spec = self.spec
        sequences: Sequences = self.sequences
        feed: Feed | None = None
        if phase == DECODE:
            assert self.continued is not None
            sequences, feed = self.continued, continuing(self.loaded, spec.decode)
        width = sum(ffn.width for ffn in self.loaded.sites.ffns if ffn.layer.index in self.layers)
        slots = capacity(spec.reservoir_tokens, spec.reservoir_mb, 1, width, self.loaded.model.dtype.itemsize)
        return record_sequences(
            self.loaded,
            sequences,
            layers=self.layers,
            slots=slots,
            seed=spec.data.seed,
            batch_size=spec.batch_size,
            what="recording" if phase == PREFILL else "recording what the model writes",
            progress=self.progress,
            shards=Shards(folder, phase),
            team=self.crew,
            strict=spec.strict,
            feed=feed,
        )

    @property
    def cett_targets(self) -> tuple[float, ...]:
        """The levels to solve: those asked for, and the one whose thresholds make the masks `cett` of the probes."""
        needed = self.probed is not None and MaskKind.CETT in self.spec.masks
        asked_for = self.spec.cett_targets
        return tuple(sorted({*asked_for, CETT_TARGET})) if needed else asked_for

    @property
    def phases(self) -> tuple[str, ...]:
        return (PREFILL,) if self.continued is None else (PREFILL, DECODE)


def _with_probes(
    spec: ProfileSpec, reader: TextReader, loaded: LoadedModel, progress: Progress
) -> tuple[ProfileSpec, ProbeTexts | None]:
    """The spec with its probes named one by one, and their texts; what nobody named gives way where text is short."""
    names = chosen(spec.probes, loaded.record.parameters)
    asked_by_name = set(spec.probes) & set(names)
    texts = None
    while names and texts is None:
        try:
            texts = probe_texts(reader, names, loaded.record.vocab_size)
        except DataError as error:
            if asked_by_name:
                raise
            short = names[:1] if "uncertainty" in names else names
            names = tuple(name for name in names if name not in short)
            progress.note(f"the probes {', '.join(short)} are left out: {error.what}")
    if CHEAP in spec.probes and not chosen(spec.probes, loaded.record.parameters):
        progress.note("probes are left out on a model of this size: measure them with --probes default")
    if texts is not None:
        progress.note(f"probes: {', '.join(names)} (--probes none leaves them out)")
    return replace(spec, probes=names), texts


def chosen_layers(asked_for: tuple[int, ...] | None, loaded: LoadedModel, option: str = "--layers") -> tuple[int, ...]:
    """The layers that an option asks for; raises ModelError naming one that the model does not have."""
    count = len(loaded.sites.layers)
    absent = sorted({layer for layer in asked_for or () if not 0 <= layer < count})
    if absent:
        there = f"there are no layers {absent[0]} to {absent[-1]}" if absent[1:] else f"there is no layer {absent[0]}"
        raise ModelError(
            f"{there}: the model has layers 0 to {count - 1}", f"correct {option}, for example 0-{count - 1}"
        )
    return tuple(sorted(set(asked_for))) if asked_for else tuple(range(count))


def _check_experts(spec: ProfileSpec, loaded: LoadedModel, layers: tuple[int, ...], progress: Progress) -> None:
    """Say how layers of experts are measured; raises ModelError where a dump asks for what they do not have."""
    mixed = set(loaded.sites.moe_layers) & set(layers)
    if not mixed:
        return
    dumped = mixed & set(layers if spec.dump is None or spec.dump.layers is None else spec.dump.layers)
    if spec.dump is not None and dumped and {kind.value for kind in IN_EXPERTS} & set(spec.dump.kinds):
        raise ModelError(
            f"layer {min(dumped)} is a mixture of experts: a token passes through some of them, so its neurons cannot"
            " be dumped as one row",
            "dump attn_in, attn_out or mlp_in there, or a dense layer",
        )
    where = f"layer {min(mixed)} holds" if len(mixed) == 1 else f"layers {min(mixed)} to {max(mixed)} hold"
    progress.note(
        f"{where} experts: CETT and co-activation are those of each expert over its own tokens, the probes those of the"
        " neurons of all experts, a token keeping none of an expert that it is not routed to"
    )


def _lead(job: Job) -> Path:
    """Open the run, tell the others, record, merge and write."""
    told = False
    try:
        with open_run(_request(job)) as writer, fitting():
            told = True
            job.crew.told_text(COMPLETE if writer.complete else str(writer.path / SHARDS))
            job.crew.told_text(str(writer.path))
            if writer.complete:
                job.progress.note(f"{writer.path} is up to date")
            else:
                _record_and_write(job, writer)
            return writer.path
    except BaseException:
        if not told:
            job.crew.told_text(REFUSED)
        raise


def _follow(job: Job) -> Path:
    """Record this process's share into shards of its own, and send it to rank 0."""
    folder = job.crew.told_text("")
    if folder == REFUSED:
        raise DataError("the first process of this run could not start it", "its message says why")
    path = Path(job.crew.told_text(""))
    if folder != COMPLETE:
        for phase in job.phases:
            job.record(phase, Path(folder))
    return path


def _request(job: Job) -> RunRequest:
    spec, loaded = job.spec, job.loaded
    return RunRequest(
        kind=RunKind.PROFILE,
        identity={
            "asked": {**asked(spec), "model": None, "data": data_identity(spec.data)},
            "model": model_identity(loaded),
            "text": job.sequences.record.sha256,
            **({} if job.probed is None else {"probe_calibration": job.probed.calibration_sha256}),
        },
        spec=spec,
        model=loaded.record,
        texts=(job.sequences.record,),
        output=spec.output,
        root=spec.root,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        force=spec.force,
        resume=spec.resume,
    )


def _cett_thresholds(job: Job, phase: Phase) -> list[list[float]]:
    """eps of the FFNs of every recorded layer at the level of the masks `cett`; infinite (no mask) where one has no
    output."""
    solved: dict[tuple[int, int | None], CettSolution] = {(layer, None): one for layer, one in phase.cett.items()}
    solved |= {(one.layer, one.expert): one.cett for one in phase.experts}

    def eps(ffn: Ffn) -> float:
        at = solved.get((ffn.layer.index, ffn.expert))
        return at.targets[CETT_TARGET].eps if at is not None and CETT_TARGET in at.targets else math.inf

    return [[eps(ffn) for ffn in job.loaded.sites.layers[layer].ffns] for layer in job.layers]


def _record_and_write(job: Job, writer: RunWriter) -> None:
    spec, progress = job.spec, job.progress
    states = {phase: job.record(phase, writer.path / SHARDS) for phase in job.phases}
    for phase, state in states.items():
        for text in not_finite(state):
            writer.warn(text if phase == PREFILL else f"{phase}: {text}")
            progress.warn(text)
    phases = [Phase.solved(name, job.loaded, state, job.cett_targets, progress) for name, state in states.items()]
    measures = [row for phase in phases for row in phase.rows]
    if job.probed is not None:
        reader = NeuronReader(job.loaded, job.layers, mask_rules(spec.masks), _cett_thresholds(job, phases[0]))
        measures += run_probes(spec.probes, reader, job.probed, writer, progress)
    if spec.dump is not None:
        write_dump(
            Dump.of(spec.dump, job.loaded, job.layers, job.sequences), job.loaded, job.sequences, writer, progress
        )
    for phase in phases:
        write_phase(phase, writer)
    write_measures(job.loaded, measures, writer)
    writer.finish()
