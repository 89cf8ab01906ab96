"""What makes two runs the same, as far as model and text go: their content, not their names."""

from typing import Any

import torch

from actsparse.models.load import LoadedModel
from actsparse.specs import DataSpec
from actsparse.store.fingerprint import asked
from actsparse.store.provenance import processor


def model_identity(loaded: LoadedModel) -> dict[str, str]:
    """Content hashes (or the hub commit) of a model, the dtype that it computes in, and a family row of its own."""
    found = loaded.record
    brought = {} if found.family_sha256 is None else {"family": found.family_sha256}
    return {
        "weights": found.revision or found.weights_sha256,
        "config": found.config_sha256,
        "tokenizer": found.tokenizer_sha256,
        "dtype": found.dtype,
        "quantization": found.quantization or "none",
        "bytes_per_weight": f"{found.bytes_per_weight:g}",
        **brought,
    }


def device_name(loaded: LoadedModel) -> str:
    """The name of the GPU or of the processor that a model runs on."""
    if loaded.device.type == "cuda":
        return torch.cuda.get_device_name(loaded.device)
    return processor()


def machine_identity(loaded: LoadedModel) -> dict[str, Any]:
    """What times depend on beside model and text."""
    return {
        "device": device_name(loaded),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def data_identity(spec: DataSpec) -> dict[str, Any]:
    """How a text is cut, without the paths that it is read from: its content is hashed apart."""
    kind = "corpus" if spec.corpus else "data set" if spec.dataset else "prompts"
    return {**asked(spec), "prompts": None, "corpus": None, "calib": None, "dataset": None, "kind": kind}
