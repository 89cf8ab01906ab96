"""What makes two runs the same, as far as the model goes."""

from actsparse.models.load import LoadedModel


def model_identity(loaded: LoadedModel) -> dict[str, str]:
    """Content hashes (or the hub commit) of a model, and the dtype that it computes in."""
    found = loaded.record
    return {
        "weights": found.revision or found.weights_sha256,
        "config": found.config_sha256,
        "tokenizer": found.tokenizer_sha256,
        "dtype": found.dtype,
    }
