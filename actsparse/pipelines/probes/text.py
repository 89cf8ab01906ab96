"""Which text the probes read: blocks of a corpus, or the prompts joined into blocks (methods.md sections 1, 5, 6)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actsparse.core.hu1 import HistoryContexts, choose_contexts
from actsparse.core.hu2 import TypeLabels, type_labels
from actsparse.core.inertia import spread_blocks
from actsparse.core.ladder import ordinary_ids, sentence_ends
from actsparse.data.sequences import Sequences, adds_bos
from actsparse.data.texts import DEFAULT_BLOCKS, TextReader
from actsparse.errors import DataError

SPREAD = 8
MIN_TYPE_COUNT = 50
SENTENCES = 12
SHORTEST, LONGEST = 10, 48
STREAM_TOKENS = 512
# Counts of HU2 are kept for so many types at most, since they take types x neurons x layers.
MAX_TYPES = 128


@dataclass(frozen=True)
class ProbeTexts:
    """All blocks of the text, `count` (N) of which a comparison would score, and the N that popularity comes from.

    `pool` [blocks, S] and `calibration` [N, S] hold BOS where the model's tokenizer adds one (`bos`).
    """

    pool: Int[Tensor, "blocks seq"]
    count: int
    calibration: Int[Tensor, "blocks seq"]
    calibration_sha256: str
    bos: int | None
    sink_tokens: int
    prompt_length: int
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    max_positions: int | None
    seed: int

    @property
    def history_blocks(self) -> Int[Tensor, "blocks seq"]:
        """The first 2N blocks."""
        return self.pool[: 2 * self.count]

    @property
    def stream(self) -> Int[Tensor, " tokens"]:
        """The first 2N blocks as one stream without BOS."""
        return self.history_blocks[:, 0 if self.bos is None else 1 :].flatten()

    def spread(self) -> Int[Tensor, "sequences seq"]:
        """Blocks spread over the text, since neighbours share a topic: those of SI2."""
        return self.pool[spread_blocks(len(self.pool), SPREAD)]

    @cached_property
    def contexts(self) -> HistoryContexts:
        """The contexts of HU1; raises DataError where the text is too short."""
        return choose_contexts(self.stream, bos=self.bos)

    def labels(self, limit: int = MAX_TYPES) -> TypeLabels:
        """The frequent token types at the positions of `history_blocks` after the sink tokens, block after block."""
        tokens = self.history_blocks[:, self.sink_tokens :].flatten()
        return type_labels(tokens, min_count=MIN_TYPE_COUNT, limit=limit, seed=self.seed)

    def ends(self, tokens: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which tokens end a sentence."""
        ids, inverse = tokens.unique(return_inverse=True)
        return sentence_ends([str(self.tokenizer.decode([token])) for token in ids.tolist()])[inverse]

    @cached_property
    def ordinary(self) -> Int[Tensor, " ids"]:
        """Every token id but the special ones."""
        added = {token for token, text in self.tokenizer.added_tokens_decoder.items() if text.special}
        return ordinary_ids(self.vocabulary, [*added, *self.tokenizer.all_special_ids])

    @cached_property
    def sentences(self) -> tuple[Int[Tensor, " tokens"], ...]:
        """The first sentences of the text with 10 to 48 tokens, as many as fit in one stream, at most 12."""
        room = min(STREAM_TOKENS, self.max_positions or STREAM_TOKENS) - 1
        cuts = (self.ends(self.stream).nonzero().flatten() + 1).tolist()
        chosen: list[Tensor] = []
        # what follows the last end is not a whole sentence
        for sentence in self.stream.tensor_split(cuts)[:-1]:
            if SHORTEST <= len(sentence) <= LONGEST and len(sentence) <= room and len(chosen) < SENTENCES:
                chosen.append(sentence)
                room -= len(sentence)
        return tuple(chosen)

    def warnings(self, names: Sequence[str]) -> list[str]:
        """What makes the results of these probes weak."""
        found = []
        if torch.equal(self.calibration[:1], self.pool[:1]):
            found.append("popularity is measured on the text that it corrects: give more text, or another with --calib")
        if "inertia" in names and len(self.pool) < SPREAD:
            found.append(f"inertia is measured on {len(self.pool)} sequences, fewer than {SPREAD}: intervals are wide")
        if "inertia" in names and len(self.sentences) < 2:
            found.append("no sentences of 10 to 48 tokens stand in the text: the 2x2 is left out")
        if "uncertainty" in names and len(self.labels().types) == 0:
            found.append(f"no token type occurs {MIN_TYPE_COUNT} times in the text: HU2 is undefined")
        return found


def probe_texts(reader: TextReader, names: Sequence[str], vocabulary: int) -> ProbeTexts:
    """The texts of the probes `names`; raises DataError where there is too little text.

    With a corpus all its blocks, N being --limit; otherwise the prompts joined into blocks. Without a limit N is 8, and
    never more than half of the blocks. Calibration is another text, a named range, or blocks N..2N-1.
    """
    spec = reader.spec
    reader = replace(reader, notify=lambda _line: None)
    if spec.corpus is None:
        blocks, wanted = reader.calibration_blocks(), DEFAULT_BLOCKS
    else:
        blocks = replace(reader, spec=replace(spec, limit=None)).profile_sequences()
        wanted = spec.limit or DEFAULT_BLOCKS
    count = max(1, min(wanted, len(blocks) // 2))
    calibration = _calibration(reader, blocks, count)
    bos = reader.tokenizer("x").input_ids[0] if adds_bos(reader.tokenizer) else None
    texts = ProbeTexts(
        pool=blocks.stack(),
        count=count,
        calibration=calibration.stack(),
        calibration_sha256=calibration.record.sha256,
        bos=bos,
        sink_tokens=spec.sink_tokens,
        prompt_length=reader.prompt_length,
        tokenizer=reader.tokenizer,
        vocabulary=min(vocabulary, len(reader.tokenizer)),
        max_positions=reader.max_positions,
        seed=spec.seed,
    )
    if "uncertainty" in names:
        _ = texts.contexts
    return texts


def _calibration(reader: TextReader, blocks: Sequences, count: int) -> Sequences:
    spec = reader.spec
    if spec.calib is not None:
        other = replace(spec, corpus=spec.calib, calib=None, limit=count, part="all")
        return replace(reader, spec=other).profile_sequences()
    if spec.calib_blocks is None:
        return blocks.take(range(count, 2 * count)) if len(blocks) > 1 else blocks
    first, stop = spec.calib_blocks
    if stop > len(blocks):
        raise DataError(
            f"calibration blocks {first}:{stop} are not all there: the text has {len(blocks)} blocks",
            "give more text, or another range with --calib-blocks A:B",
        )
    return blocks.take(range(first, stop))
