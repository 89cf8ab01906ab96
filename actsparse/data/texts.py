"""Which text serves what: a profile's sequences; the quality, calibration and prompt texts of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from actsparse.data.dataset import read_dataset
from actsparse.data.prompts import Prompt, read_prompts, sample_prompts
from actsparse.data.sequences import Sequences, blocks_of, from_prompts, read_corpus
from actsparse.errors import DataError
from actsparse.specs import DataSpec

CORPUS_BLOCK, CORPUS_PROMPT = 512, 256
JOINED_BLOCK, JOINED_PROMPT = 256, 128
DEFAULT_BLOCKS = 8
# Rows of a data set that are read without --limit: it may be endless.
DATASET_ROWS = 1000
PARTS = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class EvalTexts:
    """The texts of an evaluation: blocks scored, blocks that methods are fitted on, prompts that are continued."""

    quality: Sequences
    calibration: Sequences
    prompts: Sequences
    prompt_length: int


@dataclass(frozen=True)
class TextReader:
    """Reads what a DataSpec names with one tokenizer; `max_positions` is the model's context."""

    spec: DataSpec
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None
    notify: Notify

    def __post_init__(self) -> None:
        if self.spec.limit is not None and self.spec.limit < 1:
            raise DataError(f"the number of sequences must be at least 1, not {self.spec.limit}", "correct --limit")

    def profile_sequences(self) -> Sequences:
        """The sequences of a profile: blocks of the corpus, or prompts."""
        if self.spec.corpus is not None:
            blocks = self._corpus(self.spec.corpus, "profile")
            return _limited(blocks, _part(len(blocks), self.spec.part), self.spec.limit)
        prompts, source = self._prompts()
        chosen = prompts[: self.spec.limit] if self.spec.limit else prompts
        return self._from_prompts(chosen, source, "profile")

    def calibration_blocks(self) -> Sequences:
        """The blocks that replays of a profile's text use: its corpus blocks, or its prompts joined into blocks."""
        if self.spec.corpus is not None:
            return self.profile_sequences()
        prompts, source = self._prompts()
        return self._joined(prompts[: self.spec.limit] if self.spec.limit else prompts, source, "calibration")

    def eval_texts(self, *, fitted: bool = True) -> EvalTexts:
        """The three texts of an evaluation; raises DataError where there is too little text.

        Without `fitted`, nothing is fitted on the spot: the calibration text is empty and all blocks may be scored.
        """
        pool, limit = self._quality_pool(fitted)
        quality = pool.take(limit, (min(limit), max(limit) + 1))
        quality = replace(quality, record=replace(quality.record, role="quality"))
        calibration = self._calibration(pool, limit) if fitted else _none_of(pool)
        return EvalTexts(quality, calibration, self._continued(quality), self.prompt_length)

    @property
    def block_length(self) -> int:
        joined = self.spec.corpus is None
        default = JOINED_BLOCK if joined else CORPUS_BLOCK
        length = self.spec.block_length or min(default, self.max_positions or default)
        if self.max_positions is not None and length > self.max_positions:
            raise DataError(
                f"blocks of {length} tokens do not fit the model's context of {self.max_positions}",
                f"use shorter blocks: --block-length {self.max_positions}",
            )
        return length

    @property
    def prompt_length(self) -> int:
        length = self.spec.prompt_length
        if self.spec.prompt_frac is not None:
            return self._prompt_share(self.spec.prompt_frac)
        if length is None:
            length = min(JOINED_PROMPT if self.spec.corpus is None else CORPUS_PROMPT, self.block_length // 2)
        shortest, longest = self.spec.sink_tokens + 1, self._longest_prompt
        if not shortest <= length <= longest:
            raise DataError(
                f"a prompt of {length} tokens leaves nothing to score or to select from"
                f" (blocks of {self.block_length}, {self.spec.sink_tokens} sink tokens)",
                f"choose --prompt-length between {shortest} and {longest}"
                if shortest <= longest
                else f"use longer blocks: --block-length {2 * shortest} or more",
            )
        return length

    @property
    def _longest_prompt(self) -> int:
        """The first scored token is predicted by the prompt's last position, which is dense: one more must follow."""
        return self.block_length - 2

    def _prompt_share(self, share: float) -> int:
        """The prompt length that is this share of a block, but at least the sink tokens."""
        length = max(1, self.spec.sink_tokens, round(share * self.block_length))
        if length > self._longest_prompt:
            raise DataError(
                f"a prompt of {share:.0%} of a block of {self.block_length} tokens leaves no sparse token to score",
                "use a smaller --prompt-frac",
            )
        return length

    def _quality_pool(self, fitted: bool) -> tuple[Sequences, list[int]]:
        """All blocks, and the places of those that are scored."""
        if self.spec.corpus is not None:
            pool = self._corpus(self.spec.corpus, "quality")
        else:
            prompts, source = self._prompts()
            pool = self._joined(prompts, source, "quality")
        split_inside = self.spec.calib is None and self.spec.calib_blocks is None and self.spec.part == "all" and fitted
        places = _part(len(pool), self.spec.part) if self.spec.corpus else list(range(len(pool)))
        room = len(places) // 2 if split_inside else len(places)
        wanted = self.spec.limit or min(room, DEFAULT_BLOCKS)
        if self.spec.limit is None and room > DEFAULT_BLOCKS:
            self.notify(f"scoring the first {wanted} of {len(places)} blocks; --limit N takes more")
        if wanted < 1 or wanted > len(places):
            have = f"{len(places)} block{'' if len(places) == 1 else 's'} of {self.block_length} tokens"
            need = f"{max(1, wanted)} to score" + (f" and {max(1, wanted)} to fit on" if split_inside else "")
            raise DataError(
                f"{pool.record.source} has {have}, and needs {need}",
                f"give more text, a smaller --limit, or shorter blocks: --block-length {self.block_length // 2}",
            )
        return pool, places[:wanted]

    def _calibration(self, pool: Sequences, scored: list[int]) -> Sequences:
        """The blocks that methods are fitted on: another file, a named range, the other half, or blocks N..2N-1."""
        role = "calibration"
        if self.spec.calib is not None:
            blocks = self._corpus(self.spec.calib, role)
            return _limited(blocks, list(range(len(blocks))), len(scored))
        if self.spec.part != "all":
            other = replace(self.spec, part="even" if self.spec.part == "odd" else "odd")
            blocks = replace(self, spec=other).calibration_blocks()
            return _limited(blocks, list(range(len(blocks))), len(scored))
        first, stop = self.spec.calib_blocks or (len(scored), 2 * len(scored))
        if not 0 <= first < stop <= len(pool):
            raise DataError(
                f"calibration blocks {first}:{stop} are not all there: {pool.record.source} has {len(pool)} blocks",
                "give more text, a smaller --limit, or another text with --calib PATH",
            )
        taken = pool.take(range(first, stop), (first, stop))
        return replace(taken, record=replace(taken.record, role=role))

    def _continued(self, quality: Sequences) -> Sequences:
        """The prompts that are generated from and timed: given prompts, else the first P tokens of scored blocks."""
        if self.spec.prompts or self.spec.dataset or self.spec.corpus is None:
            prompts, source = self._prompts()
            return self._from_prompts(prompts, source, "prompts")
        heads = tuple(ids[: self.prompt_length] for ids in quality.ids)
        return Sequences(heads, replace(quality.record, role="prompts"))

    def _prompts(self) -> tuple[list[Prompt], str]:
        if self.spec.dataset is not None:
            limit = DATASET_ROWS if self.spec.limit is None else 2 * self.spec.limit
            found = read_dataset(self.spec.dataset, self.spec.split, self.spec.text_column, limit)
            if self.spec.limit is None and len(found) == limit:
                self.notify(f"reading the first {limit:,} rows of {self.spec.dataset}; --limit N takes another number")
            source = f"{self.spec.dataset} ({self.spec.split})"
        elif self.spec.prompts:
            found, source = read_prompts(self.spec.prompts), ", ".join(self.spec.prompts)
        else:
            found, source = read_prompts([str(sample_prompts())]), "sample_prompts"
            self.notify(f"no text given: using the {len(found)} sample prompts shipped with actsparse")
        return [found[i] for i in _part(len(found), self.spec.part)], source

    def _corpus(self, path: str, role: str) -> Sequences:
        text, name = read_corpus(path)
        return self._blocks(text, name, role)

    def _joined(self, prompts: list[Prompt], source: str, role: str) -> Sequences:
        return self._blocks("\n\n".join(prompt.content for prompt in prompts), source, role)

    def _blocks(self, text: str, source: str, role: str) -> Sequences:
        return blocks_of(
            text,
            self.tokenizer,
            block_length=self.block_length,
            prompt_length=self.prompt_length,
            source=source,
            role=role,
            sink_tokens=self.spec.sink_tokens,
        )

    def _from_prompts(self, prompts: list[Prompt], source: str, role: str) -> Sequences:
        return from_prompts(
            prompts,
            self.tokenizer,
            max_length=self.max_positions,
            source=source,
            role=role,
            notify=self.notify,
            sink_tokens=self.spec.sink_tokens,
        )


def _none_of(pool: Sequences) -> Sequences:
    empty = pool.take([])
    return replace(empty, record=replace(empty.record, role="calibration"))


def _part(count: int, part: str) -> list[int]:
    start, step = PARTS[part]
    return list(range(start, count, step))


def _limited(blocks: Sequences, places: list[int], limit: int | None) -> Sequences:
    chosen = places[: limit or len(places)]
    if not chosen:
        raise DataError(
            f"{blocks.record.source} has {len(blocks)} blocks, too few to share out",
            "give more text, or shorter blocks",
        )
    return blocks.take(chosen, (min(chosen), max(chosen) + 1))
