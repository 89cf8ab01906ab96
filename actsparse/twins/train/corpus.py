"""The sampled documents as the twins read them: token ids, split by prompt, packed into rows."""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actsparse.twins.train.documents import Document, read_shards
from actsparse.twins.train.source import read_tokenizer
from actsparse.twins.train.tokenizer import BOS, EOS, token_id

HELD_OUT_EVERY = 100  # one prompt in so many is never trained on
PROMPTED_EVERY = 2  # one document in so many opens with its prompt
ENCODED_AT_ONCE = 20_000
SHARED = 128  # held-out documents that travel with the models


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token ids of each document, BOS and EOS included."""

    train: list[NDArray[np.uint16]]
    held_out: list[NDArray[np.uint16]]


def load(path: Path) -> Corpus:
    """The corpus that `main` wrote."""
    with np.load(path) as stored:
        bos = int(stored["bos"])
        return Corpus(train=_split(stored["train"], bos), held_out=_split(stored["held_out"], bos))


def text(document: Document, index: int) -> str:
    """What is trained on: the answer, in one document of two below its prompt.

    One line break stands between them: two would be one token before a digit and two before a
    letter, so that a prompt followed by both would always be answered by a list.
    """
    if index % PROMPTED_EVERY:
        return document.answer
    return f"{document.prompt}\n{document.answer}"


def is_held_out(document: Document) -> bool:
    """Whether the prompt, and so each of its answers, is kept from training."""
    return zlib.crc32(document.prompt.encode()) % HELD_OUT_EVERY == 0


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """The ids of all `texts` in one line, each with BOS before and EOS behind."""
    end = token_id(tokenizer, EOS)
    parts = [
        np.array([*item.ids, end], np.uint16)
        for first in range(0, len(texts), ENCODED_AT_ONCE)
        for item in tokenizer.encode_batch_fast(texts[first : first + ENCODED_AT_ONCE])
    ]
    return np.concatenate(parts)


def pack(documents: list[NDArray[np.uint16]], length: int) -> NDArray[np.uint16]:
    """Rows of `length` tokens, each opening with a document; one cut by the end loses its tail there."""
    rows, row, size = [], [], 0
    for document in documents:
        row.append(document)
        size += len(document)
        if size >= length:
            rows.append(np.concatenate(row)[:length])
            row, size = [], 0
    return np.stack(rows)


def batches(documents: list[NDArray[np.uint16]], length: int, rows: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """Batches [rows, length] without end; every epoch shuffles and packs the documents anew."""
    chooser = np.random.default_rng(seed)
    while True:
        order = chooser.permutation(len(documents))
        packed = pack([documents[index] for index in order], length)
        for first in range(0, len(packed) - rows + 1, rows):
            yield packed[first : first + rows]


def _split(line: NDArray[np.uint16], bos: int) -> list[NDArray[np.uint16]]:
    return np.split(line, np.flatnonzero(line == bos)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("shards", type=Path, help="what sample.py wrote")
    parser.add_argument("tokenizer", type=Path, help="what tokenizer.py wrote")
    parser.add_argument("output", type=Path, help="folder for corpus.npz and heldout.jsonl")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    documents = list(read_shards(arguments.shards, read_tokenizer(arguments.source)))
    texts = {False: [], True: []}
    for index, document in enumerate(documents):
        texts[is_held_out(document)].append(text(document, index))
    arguments.output.mkdir(parents=True, exist_ok=True)
    train, held_out = encode(tokenizer, texts[False]), encode(tokenizer, texts[True])
    np.savez_compressed(arguments.output / "corpus.npz", train=train, held_out=held_out, bos=token_id(tokenizer, BOS))
    lines = [json.dumps({"text": item}) + "\n" for item in texts[True][:SHARED]]
    (arguments.output / "heldout.jsonl").write_text("".join(lines))
    print(f"train {len(texts[False]):,} documents, {len(train):,} tokens")
    print(f"held out {len(texts[True]):,} documents, {len(held_out):,} tokens")


if __name__ == "__main__":
    main()
