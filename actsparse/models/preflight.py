"""What is checked of a model directory before anything of its size is allocated, since a directory may lie.

No limit here is met by a real model: layers and experts in the thousands, weights of one bit a parameter.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from actsparse.errors import ModelError, reason_of
from actsparse.models.room import room

MOST_JSON_BYTES = 64 * 2**20
MOST_PARTS = 10_000
PARAMETERS_A_BYTE = 8
SPARE_BYTES = 2**30
COUNTED = ("layers", "experts", "heads", "n_layer", "n_head")
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "model*.bin")


def weight_files(directory: Path, *, allow_pickle: bool) -> list[Path]:
    """The files that hold a model's weights: safetensors or, where allowed and there are none, pickles.

    Raises ModelError where an adapter lies beside them, where there are pickles only and these are not allowed, or
    where one is no plain archive.
    """
    if (directory / ADAPTER).exists():
        raise ModelError(
            f"{directory} holds an adapter ({ADAPTER}), which can name other weights than those that are here",
            f"merge the adapter into its model and save that, or remove {ADAPTER} to read the model without it",
        )
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            # reading it may never end
            raise ModelError(f"{path} is a pipe or a device, and no file of a model", "do not use this model")
    found = sorted(directory.glob("*.safetensors"))
    if found:
        _check_index(directory / "model.safetensors.index.json", directory)
        return found
    pickles = sorted({path for pattern in PICKLES for path in directory.glob(pattern)})
    if pickles and not allow_pickle:
        raise ModelError(
            f"{directory} holds pickled weights only ({pickles[0].name}), and a pickle may run code",
            "convert it to safetensors, or read it with --allow-pickle, which admits tensors alone",
        )
    for path in pickles:
        _check_archive(path)
    if pickles:
        _check_index(directory / "pytorch_model.bin.index.json", directory)
    return pickles


def read_json(path: Path) -> Any:
    """A JSON file of a model; raises ModelError where it is too large, too deep, or no JSON."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ModelError(f"{path} holds {path.stat().st_size:,} bytes, more than any model's", "check the file")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}: {path.name} cannot be used: {error}", f"check {path.name}") from None


def check_counts(directory: Path) -> None:
    """Raise ModelError where config.json asks for fewer than no layers, experts or heads, or more than any model has.

    Configurations build lists of that length while they are read.
    """
    config = read_json(directory / "config.json")
    for key, value in _numbers(config):
        if any(part in key for part in COUNTED) and not 0 <= value <= MOST_PARTS:
            fault = "a count is not negative" if value < 0 else f"no model has over {MOST_PARTS:,}"
            raise ModelError(
                f"{directory.name}: config.json cannot be used: {key} is {value:,}, and {fault}", "check config.json"
            )


def check_size(config: Any, weights: list[Path], name: str, dtype: torch.dtype, *, in_memory: bool) -> None:
    """Raise ModelError where a configuration describes more than its weights can hold or, with `in_memory`, than there
    is room for. The model is laid out without memory for it."""
    try:
        with torch.device("meta"):
            laid_out = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model class does with numbers that make no sense
        raise ModelError(f"{name}: config.json cannot be used: {reason_of(error)}", "check config.json") from error
    parameters = sum(one.numel() for one in laid_out.parameters())
    buffers = sum(one.numel() * one.element_size() for one in laid_out.buffers())
    stored = sum(path.stat().st_size for path in weights)
    if parameters > PARAMETERS_A_BYTE * stored or buffers > PARAMETERS_A_BYTE * stored + SPARE_BYTES:
        raise ModelError(
            f"the weights of {name} are {stored:,} bytes, too few for the {parameters:,} parameters and"
            f" {buffers:,} bytes of buffers that config.json describes",
            "check that the weights are whole and that this config.json belongs to them",
        )
    needed, free = parameters * dtype.itemsize, room()
    if in_memory and free is not None and needed > free.bytes:
        raise ModelError(
            f"{name} takes {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, and {free.bytes / 1e9:.1f} GB"
            f" of memory are free in {free.where}",
            "use --dtype bfloat16, or spread it with --device-map auto",
        )


def _check_index(index: Path, directory: Path) -> None:
    """Raise ModelError where an index of weights names a file outside its directory."""
    if not index.exists():
        return
    found = read_json(index)
    named = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(named, dict):
        raise ModelError(f"{index} has no weight_map", "check the index, or remove it where there is one file")
    for name in named.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names a file outside {directory}: {name}", "do not use this model")


def _check_archive(path: Path) -> None:
    """Raise ModelError where a pickle unpacks into more than its own bytes: torch writes its archives uncompressed."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", "fetch it again") from None
    if unpacked > path.stat().st_size:
        raise ModelError(
            f"{path} unpacks into {unpacked:,} bytes, more than it holds: torch did not write it", "do not use it"
        )


def _numbers(tree: Any) -> Iterator[tuple[str, int]]:
    """Every whole number of a JSON tree with its key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield key, value
            else:
                yield from _numbers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value)
