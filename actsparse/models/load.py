"""From a ModelSpec to a model that is ready to be read: weights, tokenizer, sites and record."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actsparse.errors import ModelError, reason_of
from actsparse.models.cost import embedding_rows
from actsparse.models.families import Family, family_of, nearest_row
from actsparse.models.family_file import FamilyFile, read_family
from actsparse.models.preflight import check_counts, check_size, weight_files
from actsparse.models.record import record
from actsparse.models.sites import ModelSites, resolve
from actsparse.models.sources import Source, find
from actsparse.models.weights import is_quantized, read_weights
from actsparse.results import ModelRecord
from actsparse.specs import ModelSpec

DEVICE_MAPS = ("auto", "balanced", "sequential")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer, sites and record."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: ModelSites
    record: ModelRecord

    @property
    def device(self) -> torch.device:
        """Where inputs go: the first device of a model that is spread over several."""
        first = next(self.model.get_input_embeddings().parameters()).device
        return torch.device("cpu") if first.type == "meta" else first


def load(spec: ModelSpec, notify: Callable[[str], None] = lambda _line: None) -> LoadedModel:
    """The model that `spec` names, loaded; raises ModelError naming what does not fit.

    dtype `auto` is float32 on a CPU and the checkpoint's own on a GPU; device `auto` is the first GPU, else the CPU.
    """
    source = find(spec, notify)
    weights = weight_files(source.directory, allow_pickle=spec.allow_pickle)
    config = _config(source, spec)
    family = read_family(Path(spec.family)) if spec.family is not None else None
    row = _row_of(config, family)
    device = resolve_device(spec.device)
    _check_device_map(spec)
    dtype = resolve_dtype(spec.dtype, config, device)
    if weights and not spec.trust_remote_code:
        in_memory = device.type == "cpu" and spec.device_map is None and not is_quantized(config)
        check_size(config, weights, source.resolved, dtype, in_memory=in_memory)
    model = read_weights(source, config, spec, dtype, device, pickled=_pickled(weights), notify=notify)
    sites = resolve(model, row)
    tokenizer = _tokenizer(source, spec)
    _check_vocabulary(tokenizer, model, source)
    return LoadedModel(model, tokenizer, sites, record(spec.name, source, sites, family and family.sha256))


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: Source) -> None:
    rows, largest = embedding_rows(model), max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {source.resolved} has token ids up to {largest}, its model {rows} embeddings",
            "put the tokenizer that belongs to these weights beside them",
        )


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; raises ModelError where it is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ModelError(f"there is no device '{device}'", "use --device auto, cpu, cuda or cuda:0") from None
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"device '{device}' is not supported", "use --device cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"there is no device '{device}': torch sees {torch.cuda.device_count()} GPUs", "use --device cpu"
        )
    return found


def resolve_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """A named dtype, or what `auto` means on this device; raises ModelError on an unknown name."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else (getattr(config, "dtype", None) or torch.bfloat16)
    if dtype not in DTYPES:
        raise ModelError(f"there is no dtype '{dtype}'", f"use one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _check_device_map(spec: ModelSpec) -> None:
    if spec.device_map is None:
        return
    if spec.device_map not in DEVICE_MAPS:
        raise ModelError(f"there is no device map '{spec.device_map}'", f"use one of {', '.join(DEVICE_MAPS)}")
    if spec.device != "auto":
        raise ModelError(
            f"both --device {spec.device} and --device-map {spec.device_map} are given",
            "leave out --device: the map chooses the devices",
        )


def _unknown_type(directory: Path) -> str | None:
    """The model type that a config.json names, where transformers has no such type."""
    try:
        named = json.loads((directory / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return named if isinstance(named, str) and named not in CONFIG_MAPPING else None


def _config(source: Source, spec: ModelSpec) -> Any:
    check_counts(source.directory)
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # whatever a configuration class does with values that make no sense
        if (typed := _unknown_type(source.directory)) is not None:
            near = nearest_row(typed)
            raise ModelError(
                f"model type '{typed}' is not supported: this version of transformers does not know it",
                f"if the model brings its own code, write `actsparse models {near} > row.toml` (the nearest row),"
                " correct it, and pass --family row.toml --trust-remote-code",
            ) from None
        raise ModelError(
            f"{source.resolved}: config.json cannot be used: {reason_of(error)}", "check config.json"
        ) from error


def _pickled(weights: list[Path]) -> bool:
    return bool(weights) and weights[0].suffix == ".bin"


def _row_of(config: Any, family: FamilyFile | None) -> Family:
    """The family's row, from the table or from a file; raises ModelError where there is none that fits."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family is None:
        raise ModelError(
            f"model type '{config.model_type}' is not a causal language model",
            "actsparse reads decoder-only models, such as llama, mistral, qwen2, gpt2 or opt",
        )
    if family is None:
        return family_of(config.model_type)
    if family.row.model_type != config.model_type:
        raise ModelError(
            f"{family.path} is the row of '{family.row.model_type}', and the model is a '{config.model_type}'",
            f'write model_type = "{config.model_type}" if the row is meant for it',
        )
    return family.row


def _tokenizer(source: Source, spec: ModelSpec) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            source.directory, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises Exception itself on a damaged file
        raise ModelError(
            f"the tokenizer of {source.resolved} cannot be loaded: {reason_of(error)}",
            "put tokenizer.json and tokenizer_config.json beside the weights",
        ) from error
