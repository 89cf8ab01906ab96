"""The 2x2: {real sentences, random words} x {each alone, all in one stream} (methods.md section 6)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsparse.core.inertia import sentence_masks, sentence_matrices
from actsparse.core.ladder import SINK_TOKENS, random_tokens
from actsparse.core.mask_rules import MaskRule
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.text import ProbeTexts

BANDS = ("early", "middle", "late")

# Per-sentence masks by rule.
SentenceMasks = dict[MaskRule, Bool[Tensor, "layers sentences units"]]


def add_2x2(setting: Setting, found: Found) -> None:
    """Rows of `matrix_2x2`, and the matrices themselves as tensors; none where the text has fewer than 2 sentences."""
    texts = setting.texts
    real = texts.sentences
    if len(real) < 2:
        return
    for content, sentences in {"real": real, "random": _random_words(texts, real)}.items():
        for feed in ("parallel", "sequential"):
            masks = _masks(setting, sentences, feed)
            for rule in setting.rules:
                for pop, rates in setting.rates(rule).items():
                    matrices = sentence_matrices(masks[rule], rates)
                    where = {**rule.where, "pop": pop, "text": content, "feed": feed}
                    found.add_layers("matrix_2x2", matrices.similarity, **where)
                    for band, interval in zip(BANDS, matrices.bands, strict=True):
                        found.add_interval("matrix_2x2", interval, layer=None, **where, band=band)
                    name = f"matrix_2x2.{content}.{feed}.{rule.name}" + ("" if pop is None else f".{pop}")
                    bands = (matrices.early, matrices.middle, matrices.late)
                    found.tensors[name] = torch.stack(bands).float()


def _random_words(texts: ProbeTexts, real: Sequence[Int[Tensor, " tokens"]]) -> list[Tensor]:
    """Sentences of the same lengths, of uniformly random tokens."""
    padded = torch.nn.utils.rnn.pad_sequence(list(real), batch_first=True)
    drawn = random_tokens(padded, texts.ordinary, seed=texts.seed)
    return [row[: len(sentence)] for row, sentence in zip(drawn, real, strict=True)]


def _masks(setting: Setting, sentences: Sequence[Tensor], feed: str) -> SentenceMasks:
    """One mask a sentence and layer, without its first four tokens."""
    reader = setting.reader
    front = torch.tensor([] if setting.texts.bos is None else [setting.texts.bos], dtype=torch.long)
    shape = (len(reader.layers), len(sentences), reader.units)
    masks = {rule: torch.zeros(shape, dtype=torch.bool) for rule in reader.rules}

    def feed_together(first: int, part: Sequence[Tensor]) -> None:
        ids = torch.cat([front, *part])[None]
        starts = len(front) + torch.tensor([0, *(len(one) for one in part)]).cumsum(0)

        def on_layer(place: int, a: Tensor) -> None:
            rows = [
                a[0, start + SINK_TOKENS : stop]
                for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
            ]
            for rule, kept in masks.items():
                own = [reader.masks(place, row, rule) for row in rows]
                found = sentence_masks(rows, own, rule.density, reader.widths[place])
                kept[place, first : first + len(part)] = found.cpu()

        reader.read(ids, on_layer)

    if feed == "sequential":
        feed_together(0, sentences)
    else:
        for place, sentence in enumerate(sentences):
            feed_together(place, [sentence])
    return masks
