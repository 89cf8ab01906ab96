"""Trains the twins' tokenizer on the sampled text: digits one by one, then 4096 byte-level BPE entries."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from actsparse.twins.train.documents import Document, read_shards
from actsparse.twins.train.source import read_tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 4096
POSITIONS = 1024


def train(documents: Iterable[Document]) -> Tokenizer:
    """A tokenizer that opens every text with BOS, as in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{document.prompt}\n{document.answer}" for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, token_id(tokenizer, BOS))],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"the tokenizer has no {token}")
    return found


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the two files that `AutoTokenizer` reads."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("shards", type=Path, help="what sample.py wrote")
    parser.add_argument("output", type=Path, help="folder for tokenizer.json and its config")
    parser.add_argument("--documents", type=int, default=60_000, help="as many as are learnt from")
    arguments = parser.parse_args()
    documents = list(read_shards(arguments.shards, read_tokenizer(arguments.source)))
    save(train(documents[: arguments.documents]), arguments.output)


if __name__ == "__main__":
    main()
