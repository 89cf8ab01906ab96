"""GGUF files, converted once into a directory that transformers loads in seconds.

The converter of transformers ignores `tokenizer.ggml.pre`, the rule that cuts text before byte-pair merging; it is
restored here, since wrong token ids change every number that follows.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actsparse.errors import ModelError, reason_of
from actsparse.models.gguf_header import read_header
from actsparse.models.home import file_sha256, home, make_folder

SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
GPT2_LIKE = frozenset({"gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jina-es", "jina-de"})
KEPT_BY_CONVERTER = frozenset({"llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-llm", "default", ""})


def converted(path: Path, notify: Callable[[str], None]) -> Path:
    """The directory of the model in a `.gguf` file, converted on first use (float32, dequantised).

    Raises ModelError where the file is damaged or its architecture is unknown to transformers.
    """
    directory = home() / "models" / f"{path.stem}-{file_sha256(path)[:12]}"
    if (directory / "config.json").exists():
        return directory
    read_header(path)
    notify(f"converting {path.name} once (about 40 s for 135 M parameters), kept in {directory}")
    make_folder(directory.parent)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        work = Path(folder) / "model"
        _convert(_alone(path, Path(folder) / "source"), path, work, notify)
        try:
            os.replace(work, directory)
        except OSError:
            if not (directory / "config.json").exists():
                raise
            shutil.rmtree(work, ignore_errors=True)
    return directory


def _alone(path: Path, folder: Path) -> Path:
    """A link to the file in a folder of its own: what lies beside it may bring code or another tokenizer, and is not
    in the sum that names the converted model."""
    folder.mkdir()
    link = folder / path.name
    link.symlink_to(path.resolve())
    return link


def _convert(link: Path, path: Path, target: Path, notify: Callable[[str], None]) -> None:
    with _no_bars():
        model, tokenizer = _read(link, path)
        _restore_pre_tokenizer(tokenizer, _pre_tokenizer_name(path), path, notify)
        try:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        except OSError as error:
            raise ModelError(
                f"the converted model cannot be written to {target.parent}: {error.strerror or error}",
                "free some space, or set ACTSPARSE_HOME to another disk",
            ) from None


def _read(link: Path, path: Path) -> tuple[Any, Any]:
    """The dequantised model and the tokenizer of a GGUF file, as transformers reads them through its link."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # the converter draws bars of its own, whatever transformers is told
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                link.parent,
                gguf_file=link.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name, trust_remote_code=False)
            return model, tokenizer
    except Exception as error:  # whatever readers and converters do with a damaged file
        raise ModelError(
            f"{path} cannot be converted: {reason_of(error)}",
            "check that the file is whole and its architecture is supported",
        ) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which say nothing that a person asked for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pre_tokenizer_name(path: Path) -> str:
    from gguf import GGUFReader

    found = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return str(found.contents()) if found is not None else ""


def _restore_pre_tokenizer(tokenizer: Any, pre: str, path: Path, notify: Callable[[str], None]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    elif pre in GPT2_LIKE:
        tokenizer.backend_tokenizer.pre_tokenizer = byte_level
    elif pre not in KEPT_BY_CONVERTER:
        notify(f"{path.name}: its pre-tokenizer '{pre}' is not known here; token ids may differ from the original")
