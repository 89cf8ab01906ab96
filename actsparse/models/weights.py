"""The weights of a model, read into its class: whole, fitting, and unpacked where that is asked for."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as library

from actsparse.errors import ModelError, is_out_of_memory, reason_of
from actsparse.models.sources import Source
from actsparse.specs import ModelSpec

REPORTERS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")


def _caps_scores(config: Any) -> bool:
    """Whether attention scores are soft-capped (gemma2): transformers before 5.23 leaves that out in sdpa, silently."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def read_weights(
    source: Source,
    config: Any,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    pickled: bool,
    notify: Callable[[str], None],
) -> PreTrainedModel:
    """The model of a configuration with the weights of its directory, on its device.

    `notify` hears of weights that the model has no place for. Raises ModelError where weights are damaged, missing or
    of another shape, or where there is no room for them.
    """
    unpacking = spec.dequantize and is_quantized(config)
    settings = _dequantizing(config) if unpacking else None
    try:
        with _without_report():
            # the stubs of transformers do not know that output_loading_info makes this a pair
            model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                source.directory,
                config=config,
                dtype=dtype,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=not pickled,
                weights_only=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named, and refused, below
                **({} if spec.device_map is None else {"device_map": spec.device_map}),
                **({} if settings is None else {"quantization_config": settings}),
                **({"attn_implementation": "eager"} if _caps_scores(config) else {}),
            )
    except Exception as error:  # whatever a model class and the readers of weights do with damaged files
        raise (_no_room(source, device) if is_out_of_memory(error) else _unreadable(source, config, error)) from error
    _check_fit(found, source, notify)
    if unpacking and settings is None:
        model = dequantized(model, source)
    return (model if spec.device_map else _move(model, device, source)).eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """Loading without a bar, and without the table of what fits badly: what matters of it is said in our words."""
    levels = {logger: logger.level for logger in map(logging.getLogger, REPORTERS)}
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    for reporter in levels:
        reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for reporter, level in levels.items():
            reporter.setLevel(level)
        if shown:
            library.enable_progress_bar()


def _check_fit(found: dict[str, Any], source: Source, notify: Callable[[str], None]) -> None:
    """Raise ModelError where a model lacks weights, or has them in another shape."""
    if found["mismatched_keys"]:
        (name, here, there), *others = sorted(found["mismatched_keys"])
        raise ModelError(
            f"the weights of {source.resolved} do not fit its config.json: {name} is {list(here)} in the file, and"
            f" {list(there)} by config.json{_and_more(others)}",
            "correct config.json, or put the weights that belong to it into the directory",
        )
    if found["missing_keys"]:
        name, *others = sorted(found["missing_keys"])
        raise ModelError(
            f"the weights of {source.resolved} lack {name}{_and_more(others)}",
            "check that the directory holds every *.safetensors file of its index",
        )
    if found["unexpected_keys"]:
        name, *others = sorted(found["unexpected_keys"])
        notify(f"the model has no place for some weights of {source.resolved}, left out: {name}{_and_more(others)}")


def _and_more(others: list[Any]) -> str:
    return f" (and {len(others)} more)" if others else ""


def _move(model: PreTrainedModel, device: torch.device, source: Source) -> PreTrainedModel:
    try:
        return model.to(device)  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise _no_room(source, device) from error


def _no_room(source: Source, device: torch.device) -> ModelError:
    others = "--device-map auto" if device.type == "cpu" else "--device cpu, --device-map auto"
    return ModelError(f"{source.resolved} does not fit on {device}", f"try {others} or --dtype bfloat16")


def _unreadable(source: Source, config: Any, error: Exception) -> ModelError:
    reason = reason_of(error)
    if is_quantized(config):
        return ModelError(
            f"{source.resolved} is quantised and cannot be loaded here: {reason}",
            "install the quantiser that it names, or load it with --dequantize",
        )
    return ModelError(
        f"the weights of {source.resolved} cannot be loaded: {reason}",
        "check that the directory holds whole *.safetensors files for its config.json",
    )


def is_quantized(config: Any) -> bool:
    """Whether a configuration says that its weights are quantised."""
    return getattr(config, "quantization_config", None) is not None


def _dequantizing(config: Any) -> Any | None:
    """The checkpoint's own quantisation settings with `dequantize` switched on; None where they have no such switch."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    stored = config.quantization_config
    settings = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    built: Any = AutoQuantizationConfig.from_dict(settings)
    if not hasattr(built, "dequantize"):
        return None
    built.dequantize = True
    return built


def dequantized(model: PreTrainedModel, source: Source) -> PreTrainedModel:
    """The model with plain weights, unpacked after loading; raises ModelError where its quantiser cannot."""
    try:
        return model.dequantize()  # pyright: ignore[reportReturnType]
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"transformers cannot dequantise {source.resolved}: {reason_of(error)}",
            "use the unquantised checkpoint of this model",
        ) from None
