"""Rows of a data set as prompts: a local file, or one of the hub, streamed or from a cache."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from actsparse.data.network import is_offline
from actsparse.data.prompts import Prompt, prompt_of
from actsparse.errors import DataError

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def read_dataset(name: str, split: str, column: str, limit: int | None) -> list[Prompt]:
    """Rows of a data set as prompts; `name` is a hub id (with `:CONFIG` where the data set has several) or a local csv,
    json, jsonl, parquet or text file.

    Raises DataError where there is no such data set, where the hub cannot be asked, and offline where it is not cached.
    """
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    path = Path(name).expanduser()
    if path.suffix in BUILDERS and not path.exists():
        raise DataError(f"there is no file {name}", "check the path given with --dataset")
    try:
        found = list(itertools.islice(_prompts(_rows(name, path, split), column, name), limit))
    except ConnectionError as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"data set '{name}' is not here, and the hub could not be asked: {reason}",
            "check the network; a data set that was fetched before is read with --offline",
        ) from None
    except (DatasetNotFoundError, DataFilesNotFoundError, FileNotFoundError):
        raise DataError(
            f"there is no data set '{name}' here or on the hub", "check the name, or give a local file with --prompts"
        ) from None
    except ValueError as error:
        raise DataError(
            f"data set '{name}' cannot be read: {error}",
            "check --split, the file's format, or name a part: NAME:CONFIG",
        ) from None
    if not found:
        raise DataError(f"data set '{name}', split '{split}' has no rows", "choose another --split")
    return found


def _rows(name: str, path: Path, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    if path.is_file() and path.suffix in BUILDERS:
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    repository, _, config = name.partition(":")
    if is_offline() and not path.is_dir():
        return _cached_rows(repository, config or None, split)
    return load_dataset(repository, config or None, split=split, streaming=True)


def _cached_rows(repository: str, config: str | None, split: str) -> Iterable[Any]:
    """Rows of what `load_dataset` has prepared before, else of the files that `hf download` has fetched."""
    from datasets import load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return load_dataset(repository, config, split=split, streaming=True)
    except (ConnectionError, DataFilesNotFoundError, DatasetNotFoundError, FileNotFoundError):
        pass
    try:
        folder = snapshot_download(repository, repo_type="dataset", local_files_only=True)
        return load_dataset(folder, config, split=split, streaming=True)
    except (LocalEntryNotFoundError, HFValidationError, DataFilesNotFoundError, DatasetNotFoundError):
        raise DataError(
            f"data set '{repository}' is not in the cache, and nothing may be fetched offline",
            f"fetch it once with a network: hf download --repo-type dataset {repository}",
        ) from None


def _prompts(rows: Iterable[Any], column: str, name: str) -> Iterator[Prompt]:
    for index, row in enumerate(rows):
        if column not in row:
            raise DataError(
                f"data set '{name}' has no column '{column}'",
                f"it has {', '.join(row)}: --text-column {next(iter(row))}",
            )
        if not row[column] or (isinstance(row[column], str) and not row[column].strip()):
            continue
        yield prompt_of({"messages" if isinstance(row[column], list) else "text": row[column]}, f"{name}[{index}]")
