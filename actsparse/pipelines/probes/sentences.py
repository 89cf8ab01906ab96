"""The 2x2: {real sentences, random words} x {each alone, all in one stream} (methods.md section 6)."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from actsparse.core.inertia import sentence_masks, sentence_matrices
from actsparse.core.ladder import SINK_TOKENS, random_tokens
from actsparse.pipelines.probes.reading import DENSITIES
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.text import ProbeTexts

SENTENCES = 12
SHORTEST, LONGEST = 10, 48
STREAM_TOKENS = 512
BANDS = ("early", "middle", "late")

# Per-sentence masks by density.
SentenceMasks = dict[float, Bool[Tensor, "layers sentences neurons"]]


def add_2x2(setting: Setting, found: Found) -> None:
    """Rows of `matrix_2x2`, and the matrices themselves as tensors; none where the text has fewer than 2 sentences."""
    texts = setting.texts
    real = choose_sentences(texts)
    if len(real) < 2:
        return
    for content, sentences in {"real": real, "random": _random_words(texts, real)}.items():
        for feed in ("parallel", "sequential"):
            masks = _masks(setting, sentences, feed)
            for density in DENSITIES:
                for pop, rates in setting.rates(density).items():
                    matrices = sentence_matrices(masks[density], rates)
                    where = {"r": density, "pop": pop, "text": content, "feed": feed}
                    found.add_layers("matrix_2x2", matrices.similarity, **where)
                    for band, interval in zip(BANDS, matrices.bands, strict=True):
                        found.add_interval("matrix_2x2", interval, layer=None, **where, band=band)
                    name = f"matrix_2x2.{content}.{feed}.r{density:g}" + ("" if pop is None else f".{pop}")
                    bands = (matrices.early, matrices.middle, matrices.late)
                    found.tensors[name] = torch.stack(bands).float()


def choose_sentences(texts: ProbeTexts) -> list[Int[Tensor, " tokens"]]:
    """The first sentences of the text with 10 to 48 tokens, as many as fit in one stream, at most 12."""
    stream, room = texts.stream, min(STREAM_TOKENS, texts.max_positions or STREAM_TOKENS) - 1
    cuts = (texts.ends(stream).nonzero().flatten() + 1).tolist()
    chosen: list[Tensor] = []
    # what follows the last end is not a whole sentence
    for sentence in stream.tensor_split(cuts)[:-1]:
        if SHORTEST <= len(sentence) <= LONGEST and len(sentence) <= room:
            chosen.append(sentence)
            room -= len(sentence)
        if len(chosen) == SENTENCES:
            break
    return chosen


def _random_words(texts: ProbeTexts, real: list[Tensor]) -> list[Tensor]:
    """Sentences of the same lengths, of uniformly random tokens."""
    padded = torch.nn.utils.rnn.pad_sequence(real, batch_first=True)
    drawn = random_tokens(padded, texts.ordinary, seed=texts.seed)
    return [row[: len(sentence)] for row, sentence in zip(drawn, real, strict=True)]


def _masks(setting: Setting, sentences: list[Tensor], feed: str) -> SentenceMasks:
    """One mask a sentence and layer, without its first four tokens."""
    reader = setting.reader
    front = torch.tensor([] if setting.texts.bos is None else [setting.texts.bos], dtype=torch.long)
    shape = (len(reader.layers), len(sentences), reader.neurons)
    masks = {density: torch.zeros(shape, dtype=torch.bool) for density in DENSITIES}

    def feed_together(first: int, part: list[Tensor]) -> None:
        ids = torch.cat([front, *part])[None]
        starts = len(front) + torch.tensor([0, *(len(one) for one in part)]).cumsum(0)

        def on_layer(place: int, a: Tensor) -> None:
            rows = [
                a[0, start + SINK_TOKENS : stop]
                for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
            ]
            for density, kept in masks.items():
                kept[place, first : first + len(part)] = sentence_masks(rows, density).cpu()

        reader.read(ids, on_layer)

    if feed == "sequential":
        feed_together(0, sentences)
    else:
        for place, sentence in enumerate(sentences):
            feed_together(place, [sentence])
    return masks
