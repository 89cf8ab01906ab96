"""The model and text of a profile again: loaded when something first asks for more than the profile's tables."""

from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from actsparse.data.sequences import Sequences
from actsparse.data.texts import JOINED_BLOCK, TextReader
from actsparse.errors import DataError, PlanError
from actsparse.methods.short import ShortForm
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.calibration import TextCalibration
from actsparse.pipelines.calibration_statistics import Statistics
from actsparse.pipelines.identity import model_identity
from actsparse.pipelines.progress import Progress, describe
from actsparse.pipelines.replay import Replay
from actsparse.pipelines.training import Checkpoints
from actsparse.results import ModelRecord
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store.runs import ProfileRun


def too_short(run: ProfileRun) -> tuple[int, int] | None:
    """The tokens of a profile's prompts, and those of the block that a replay would join them into, where these do not
    suffice for one; else None."""
    (text, *_), model = run.manifest.texts, run.manifest.model
    asked = msgspec.convert(run.manifest.spec["data"], DataSpec).block_length
    longest = JOINED_BLOCK if model is None or model.max_positions is None else model.max_positions
    block = asked or min(JOINED_BLOCK, longest)
    return (text.tokens, block) if text.block_length is None and text.tokens < block else None


@dataclass(frozen=True)
class Profiled:
    """A profile, and what it was made from."""

    run: ProfileRun
    spec: ThresholdSpec
    short: ShortForm
    progress: Progress

    @property
    def model(self) -> ModelRecord:
        """The model that was profiled."""
        assert self.run.manifest.model is not None
        return self.run.manifest.model

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as it was profiled; raises PlanError where its content has changed since."""
        self.progress.note(f"the profile's tables do not suffice: loading {self.model.resolved} again")
        asked = self._asked.model
        # the dtype that the profile computed in, whatever `auto` would mean on this device
        spec = replace(asked, dtype=self.model.dtype, device=self.spec.device, offline=self.spec.offline)
        loaded = load(spec, self.progress.note)
        self.progress.detail(describe(loaded.record, str(loaded.device)))
        if model_identity(loaded) != self.run.manifest.identity["model"]:
            raise PlanError(
                f"the model {asked.name} is not the one that was profiled: its files have changed",
                "profile it again: actsparse profile --model " + asked.name,
            )
        return loaded

    @cached_property
    def blocks(self) -> Sequences:
        """The profile's text as blocks; raises PlanError where it has changed since, or is too short for one."""
        reader = self._own_reader
        if reader.profile_sequences().record.sha256 != self.run.manifest.texts[0].sha256:
            raise PlanError("the profile's text has changed since it was profiled", "profile the new text")
        try:
            return reader.calibration_blocks()
        except DataError as error:
            # blocks are cut as the profile was asked to cut them: the command at hand has no such option
            raise PlanError(f"the profile has too little text: {error.what}", f"profile again: {error.hint}") from None

    @property
    def prompt_length(self) -> int:
        """Positions of a block that are prompt."""
        return self._own_reader.prompt_length

    @property
    def was_loaded(self) -> bool:
        """Whether model and text were asked for."""
        return "blocks" in self.__dict__

    def transfer_blocks(self, path: str) -> Sequences:
        """Another text, cut into as many blocks of the same length as were calibrated on (or as there are)."""
        data = replace(
            self._asked.data,
            corpus=path,
            prompts=(),
            dataset=None,
            calib=None,
            limit=None,
            block_length=len(self.blocks.ids[0]),
            prompt_length=self.prompt_length,
        )
        found = self._reader(data).calibration_blocks()
        count = min(len(found), len(self.blocks))
        taken = found.take(range(count), (0, count))
        return Sequences(taken.ids, replace(taken.record, role="transfer"))

    def calibration(self, checkpoints: Checkpoints) -> TextCalibration:
        """What methods are fitted from: the profile's tables, and model and text where these do not suffice."""
        return TextCalibration(
            self.model.ffn_widths,
            lambda: Statistics.of_run(self.run),
            lambda: Replay(self.loaded, self.blocks, self.prompt_length, self.progress),
            checkpoints,
            self.model.ffns,
        )

    @cached_property
    def _asked(self) -> ProfileSpec:
        spec = dict(self.run.manifest.spec)
        model, data = msgspec.convert(spec["model"], ModelSpec), msgspec.convert(spec["data"], DataSpec)
        return ProfileSpec(model=model, data=data)

    @cached_property
    def _own_reader(self) -> TextReader:
        return self._reader(self._asked.data)

    def _reader(self, data: DataSpec) -> TextReader:
        return TextReader(data, self.loaded.tokenizer, self.loaded.record.max_positions, self.progress.note)
